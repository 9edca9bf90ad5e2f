"""A strict reader of plain mappings into frozen dataclasses.

Everything that YAML can say and a dataclass cannot hold is an error that names the key, the value,
what is allowed and, for an unknown key, the nearest known one. Nothing is converted silently,
except that a whole number may stand where a float is asked for.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar, Union

T = TypeVar("T")


class ParamsError(ValueError):
    """A setting that cannot be used; the message says which one and what would be."""


@dataclass(frozen=True)
class Range:
    """Bounds of a number, both inclusive unless `open_low`; for use inside `Annotated`."""

    low: float | None = None
    high: float | None = None
    open_low: bool = False

    def allows(self, value: float) -> bool:
        above = self.low is None or (value > self.low if self.open_low else value >= self.low)
        return above and (self.high is None or value <= self.high)

    def __str__(self) -> str:
        low = None if self.low is None else f"{'>' if self.open_low else '>='} {self.low:g}"
        high = None if self.high is None else f"<= {self.high:g}"
        return " and ".join(bound for bound in (low, high) if bound)


Count = Annotated[int, Range(1)]
"""A whole number of at least 1."""
Natural = Annotated[int, Range(0)]
"""A whole number of at least 0."""
Positive = Annotated[float, Range(0, open_low=True)]
"""A number above 0."""
Share = Annotated[float, Range(0, 1)]
"""A number between 0 and 1."""


def read(kind: type[T], value: Any, key: str = "") -> T:
    """Build `kind` from plain `value` (mappings, lists, scalars).

    `key` is the dotted place of `value` in the settings, used in messages.
    Raises `ParamsError` for an unknown key, a missing key, a wrong type or a value out of bounds.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        number = read(arguments[0], value, key)
        if number is not None and not arguments[1].allows(number):
            raise ParamsError(f"{key}: {value!r} is not allowed; it must be {arguments[1]}")
        return number
    if origin is Literal:
        if value not in arguments or isinstance(value, bool):
            raise ParamsError(f"{key}: {value!r} is not allowed; choose one of {listed(arguments)}{nearest(value, arguments)}")
        return value
    if origin in (Union, types.UnionType):
        return _read_union(arguments, value, key)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise _wrong_type(key, value, "a list")
        return tuple(read(arguments[0], item, f"{key}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise _wrong_type(key, value, "a mapping")
        return {str(name): read(arguments[1], item, _join(key, name)) for name, item in value.items()}
    if dataclasses.is_dataclass(kind):
        return _read_dataclass(kind, value, key)
    return _read_scalar(kind, value, key)


def plain(value: Any) -> Any:
    """The inverse of `read`: dataclasses become mappings, tuples become lists."""
    if dataclasses.is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def _read_dataclass(kind: type[T], value: Any, key: str) -> T:
    if not isinstance(value, Mapping):
        raise _wrong_type(key, value, f"a mapping with the keys {listed(_names(kind))}")
    hints = typing.get_type_hints(kind, include_extras=True)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    for name in value:
        if name not in fields:
            raise ParamsError(f"{_join(key, name)}: unknown key; the keys here are {listed(fields)}{nearest(name, fields)}")
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in value:
            raise ParamsError(f"{_join(key, name)}: missing; it has no default")
    built = {name: read(hints[name], _with_kind(item, fields[name].default), _join(key, name)) for name, item in value.items()}
    try:
        return kind(**built)
    except ParamsError as error:  # raised by the section's own check of values that contradict each other
        raise ParamsError(f"{key}: {error}" if key else str(error)) from None


def _with_kind(value: Any, default: Any) -> Any:
    """A section that leaves out its `kind` is of the same one as if it were left out as a whole."""
    kind = getattr(default, "kind", None)
    return {"kind": kind, **value} if kind and isinstance(value, Mapping) else value


def _read_union(members: tuple[type, ...], value: Any, key: str) -> Any:
    """`X | None`, or dataclasses told apart by their `kind` field."""
    if value is None and type(None) in members:
        return None
    members = tuple(member for member in members if member is not type(None))
    if len(members) == 1:
        return read(members[0], value, key)
    kinds = {typing.get_args(typing.get_type_hints(member)["kind"])[0]: member for member in members}
    if not isinstance(value, Mapping):
        raise _wrong_type(key, value, f"a mapping with a `kind` out of {listed(kinds)}")
    name = value.get("kind")
    if name not in kinds:
        raise ParamsError(f"{_join(key, 'kind')}: {name!r} is not allowed; choose one of {listed(kinds)}{nearest(name, kinds)}")
    for stray in value:
        owners = [kind for kind, member in kinds.items() if stray in _names(member)]
        if owners and name not in owners:
            raise ParamsError(
                f"{_join(key, stray)}: unknown key of kind {name}, whose keys are {listed(_names(kinds[name]))}; it is one of kind "
                f"{listed(owners)}"
            )
    return read(kinds[name], value, key)


def _names(kind: type) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


def _read_scalar(kind: type, value: Any, key: str) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise _wrong_type(key, value, {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}[kind])
    return value


def _join(key: str, name: object) -> str:
    return f"{key}.{name}" if key else str(name)


def listed(names: typing.Iterable[object]) -> str:
    return ", ".join(str(name) for name in names)


def nearest(name: object, names: typing.Iterable[object]) -> str:
    close = difflib.get_close_matches(str(name), [str(known) for known in names], n=1, cutoff=0.5)
    return f" (did you mean `{close[0]}`?)" if close else ""


def _wrong_type(key: str, value: Any, wanted: str) -> ParamsError:
    return ParamsError(f"{key}: expected {wanted}, got {value!r} ({type(value).__name__})")
