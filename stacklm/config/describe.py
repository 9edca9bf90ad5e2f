"""Reference of the settings: every key with its type, default, allowed values and description, as YAML and as a JSON Schema.

Both are generated from the dataclasses. The description of a key is the string below it in its class; that of `kind` is the
docstring of the class.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import re
import textwrap
import types
import typing
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Annotated, Any, Literal, Union

from stacklm.config.params import NAME_PATTERN, OTHERWISE_READ, Params
from stacklm.config.schema import LARGEST_INT, Range, default_of, key_of, listed, plain

WORDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
SCHEMA_TYPES = {int: "integer", float: "number", str: "string", bool: "boolean"}
WIDTH = 120


@cache
def descriptions(kind: type) -> dict[str, str]:
    """The description of each field of a dataclass."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(tree, ast.ClassDef)
    found = {"kind": summary(kind)}
    for field, below in zip(tree.body, tree.body[1:], strict=False):
        match field, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                found[name] = " ".join(text.split())
    return found


def summary(kind: type) -> str:
    """A class's docstring in one line."""
    return " ".join((inspect.getdoc(kind) or "").split())


def explained(params: Params) -> str:
    """All settings as YAML, with defaults filled in and a comment on each key where it first occurs."""
    return "\n".join(_mapping(Params, params, "", set())) + "\n"


def json_schema() -> dict[str, Any]:
    """A JSON Schema (draft 2020-12) of params.yaml, for editors. It covers constraints on single keys only."""
    definitions: dict[str, Any] = {}
    schema: dict[str, Any] = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "params.yaml of stacklm"}
    schema |= _object(Params, definitions)
    schema["properties"]["models"] |= {"minProperties": 1, "propertyNames": {"pattern": f"^{NAME_PATTERN}$"}}
    return schema | {"$defs": definitions}


def _fields(kind: type) -> Iterator[tuple[str, Any, Any]]:
    """Field, type and default (`MISSING` if there is none) of each key."""
    hints = typing.get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        if not field.metadata.get("hidden"):
            yield field.name, hints[field.name], default_of(field)


def _members(kind: Any) -> dict[str, type]:
    """The dataclasses of a union by their `kind`; none for any other type."""
    if typing.get_origin(kind) not in (Union, types.UnionType):
        return {}
    members = [member for member in typing.get_args(kind) if dataclasses.is_dataclass(member)]
    return {typing.get_args(typing.get_type_hints(member)["kind"])[0]: member for member in members if isinstance(member, type)}


def _mapping(kind: type, value: Any, indent: str, seen: set[type], kinds: Iterable[str] = ()) -> Iterator[str]:
    """The lines of a dataclass; `kinds` are the allowed values of its `kind`."""
    new = kind not in seen
    seen.add(kind)
    for name, hint, default in _fields(kind):
        item, members, key = getattr(value, name), _members(hint), key_of(name)
        if new:
            facts = f"One of {listed(kinds)}." if name == "kind" and kinds else _facts(hint, default)
            yield from _comment(indent, "", f"{descriptions(kind).get(name, '')} {facts}")
        if dataclasses.is_dataclass(item):
            yield f"{indent}{key}:"
            yield from _mapping(type(item), item, f"{indent}  ", seen, members)
            for other in members:
                if members[other] not in seen:
                    yield from _comment(f"{indent}  ", "", f"Another kind: {other}. {summary(members[other])}")
                    yield from _keys(members[other], f"{indent}  ", "  ", seen)
        elif isinstance(item, dict) and any(map(dataclasses.is_dataclass, item.values())):
            yield f"{indent}{name}:"
            for key, one in item.items():
                yield f"{indent}  {key}:"
                yield from _mapping(type(one), one, f"{indent}    ", seen)
        elif typing.get_origin(hint) is tuple and dataclasses.is_dataclass(kept := typing.get_args(hint)[0]):
            yield from _keys(typing.cast(type, kept), indent, "  ", seen)
            yield f"{indent}{name}:{'' if item else ' []'}"
            yield from (f"{indent}  - {{{', '.join(f'{k}: {_scalar(v)}' for k, v in plain(one).items())}}}" for one in item)
        else:
            yield f"{indent}{key}: {_scalar(item)}"


def _keys(kind: type, indent: str, lead: str, seen: set[type]) -> Iterator[str]:
    """Comments on the keys of a kind that is not in use, or of list items."""
    if kind in seen:
        return
    seen.add(kind)
    for name, hint, default in _fields(kind):
        if name != "kind" or default is dataclasses.MISSING:
            yield from _comment(indent, lead, f"{key_of(name)}: {descriptions(kind).get(name, '')} {_facts(hint, default)}")
            if isinstance(hint, type) and dataclasses.is_dataclass(hint):
                yield from _keys(hint, indent, f"{lead}  ", seen)


def _comment(indent: str, lead: str, text: str) -> list[str]:
    lines = textwrap.wrap(text.strip(), WIDTH - len(indent) - len(lead) - 2, break_long_words=False, break_on_hyphens=False)
    return [f"{indent}# {lead}{line}" for line in lines]


def _facts(hint: Any, default: Any) -> str:
    """Type, allowed values and default of a key, as a sentence; nothing for a section."""
    words = _type_words(hint)
    if not words:
        return ""
    shown = "required" if default is dataclasses.MISSING else f"default {_scalar(plain(default))}"
    return f"{words[0].upper()}{words[1:]}; {shown}."


def _type_words(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return f"{_type_words(arguments[0])} {arguments[1]}"
    if origin is Literal:
        return f"one of {listed(arguments)}"
    if origin is tuple:
        return "a list of texts" if arguments[0] is str else "a list"
    if origin is dict and not dataclasses.is_dataclass(arguments[1]):
        return "a mapping"
    if origin in (Union, types.UnionType) and type(None) in arguments:
        return f"{_type_words(arguments[0])}, or null"
    return WORDS.get(hint, "")


def _scalar(value: Any) -> str:
    """A value as YAML; strings are unquoted where this is unambiguous."""
    plain_text = isinstance(value, str) and re.fullmatch(r"[A-Za-z][\w.-]*", value) and value.lower() not in OTHERWISE_READ
    return value if plain_text else json.dumps(value, ensure_ascii=False)


def _object(kind: type, definitions: dict[str, Any], tag: bool = False) -> dict[str, Any]:
    """The schema of a dataclass; with `tag` its `kind` is required, to distinguish it from others."""
    fields = list(_fields(kind))
    properties = {}
    for name, hint, default in fields:
        properties[key_of(name)] = {"description": descriptions(kind).get(name, ""), **_schema(hint, definitions, default)}
        if default is not dataclasses.MISSING:
            properties[key_of(name)]["default"] = plain(default)
    required = [key_of(name) for name, _, default in fields if default is dataclasses.MISSING or (tag and name == "kind")]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _reference(kind: type, definitions: dict[str, Any], tag: bool = False) -> dict[str, str]:
    if kind.__name__ not in definitions:
        definitions[kind.__name__] = {}  # a placeholder, for the order; no dataclass contains itself
        definitions[kind.__name__] = {"description": summary(kind), **_object(kind, definitions, tag)}
    return {"$ref": f"#/$defs/{kind.__name__}"}


def _schema(hint: Any, definitions: dict[str, Any], default: Any = None) -> dict[str, Any]:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return {**_schema(arguments[0], definitions), **_bounds(arguments[1])}
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin is tuple:
        return {"type": "array", "items": _schema(arguments[0], definitions)}
    if hint is Any:
        return {}
    if origin is dict:
        return {"type": "object", "additionalProperties": _schema(arguments[1], definitions)}
    if members := _members(hint):  # a section without `kind` is of the default's kind
        untagged = getattr(default, "kind", None)
        return {"oneOf": [_reference(member, definitions, tag=name != untagged) for name, member in members.items()]}
    if origin in (Union, types.UnionType):
        return {"anyOf": [_schema(arguments[0], definitions), {"type": "null"}]}
    if dataclasses.is_dataclass(hint):
        return _reference(typing.cast(type, hint), definitions)
    return {"type": SCHEMA_TYPES[hint], **({"maximum": LARGEST_INT} if hint is int else {})}


def _bounds(allowed: Range) -> dict[str, float]:
    low = {} if allowed.low is None else {"exclusiveMinimum" if allowed.open_low else "minimum": allowed.low}
    return low | ({} if allowed.high is None else {"maximum": allowed.high})
