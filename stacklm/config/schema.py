"""A strict reader of plain mappings into frozen dataclasses.

Anything in the YAML that the dataclasses do not allow is an error that names the key, the value, what is allowed and, for an
unknown key, the nearest known one. Nothing is converted silently, except that an integer is accepted as a float. A number is only
accepted if a tensor can hold it.
"""

from __future__ import annotations

import dataclasses
import difflib
import reprlib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar, Union

T = TypeVar("T")
Differences = dict[str, tuple[Any, Any]]

RENAMED = {
    "steps": "max_steps",
    "stop_step": "hard_stop",
    "context": "context_length",
    "batch_size": "global_batch_size",
    "micro_batch": "micro_batch_size",
    "schedule": "lr_schedule",
    "final_lr": "final_lr_fraction",
    "decay": "decay_fraction",
    "clip_norm": "max_grad_norm",
    "valid_every": "eval_every",
    "valid_tokens": "eval_tokens",
    "recompute": "activation_checkpointing",
    "processes": "nproc",
    "parallel": "strategy",
    "non_finite": "on_nonfinite",
    "milestone_every": "keep_every",
    "tokens": "max_new_tokens",
    "width": "d_model",
    "heads": "n_heads",
    "layers": "n_layers",
    "hidden": "d_ff",
    "activation": "ffn",
    "feed_forward": "ffn",
    "tied": "tie_embeddings",
    "head": "tie_embeddings",
    "join": "residual",
    "reads": "skip_connections",
    "convolution": "conv_size",
    "key_dim": "qk_head_dim",
    "rotary": "rope",
    "keys_values": "kv_sharing",
    "stack_every": "tokens_per_extra_stack",
    "in_backward": "optimizer_in_backward",
    "rest": "adamw",
    "folded": "factored",
    "micro": "per_layer",
    "nothing": "none",
    "stacks": "full",
    "exact": "bitwise",
    "close": "compatible",
    "previous": "none",
    "first": "input",
    "all": "dense",
    "layer": "none",
}
"""Keys and values of earlier versions: the error about one names its replacement."""
LARGEST_INT = 2**63 - 1
"""The largest integer of torch and DVC."""
FLOAT32 = 2.0**-126, 2.0**127
"""Smallest and largest power of two that float32 represents at full precision; weights are updated in float32."""


class ParamsError(ValueError):
    """An invalid setting; the message says which one and what is valid."""


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
        low = None if self.low is None else f"{'>' if self.open_low else '>='} {self.low:.12g}"
        high = None if self.high is None else f"<= {self.high:.12g}"
        return " and ".join(bound for bound in (low, high) if bound)


Count = Annotated[int, Range(1)]
"""A whole number of at least 1."""
Size = Annotated[int, Range(1, 2**20)]
"""A tensor dimension, bounded so that the number of elements of a weight fits into 64 bits."""
Natural = Annotated[int, Range(0)]
"""A whole number of at least 0."""
Positive = Annotated[float, Range(0, open_low=True)]
"""A number above 0."""
Share = Annotated[float, Range(0, 1)]
"""A number between 0 and 1."""


def read(kind: type[T], value: Any, key: str = "") -> T:
    """Build `kind` from plain `value` (mappings, lists, scalars).

    `key` is the dotted key of `value` in the settings, used in messages.
    Raises `ParamsError` for an unknown key, a missing key, a wrong type or a value out of bounds.
    """
    return _read(kind, value, key)


def _read(kind: Any, value: Any, key: str) -> Any:
    if kind is Any:
        return _read_plain(value, key)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        number = _read(arguments[0], value, key)
        if number is not None and not arguments[1].allows(number):
            raise ParamsError(f"{key}: {shown(value)} is not allowed; it must be {arguments[1]}")
        return number
    if origin is Literal:
        if not isinstance(value, str) or value not in arguments:
            raise ParamsError(f"{key}: {shown(value)} is not allowed; choose one of {listed(arguments)}{nearest(value, arguments)}")
        return value
    if origin in (Union, types.UnionType):
        return _read_union(arguments, value, key)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise _wrong_type(key, value, "a list")
        return tuple(_read(arguments[0], item, f"{key}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise _wrong_type(key, value, "a mapping")
        for name in value:
            if not isinstance(name, str):
                raise _wrong_type(f"{key}: the name {shown(name)}", name, "a text that YAML does not read as something else")
        return {name: _read(arguments[1], item, _join(key, name)) for name, item in value.items()}
    if dataclasses.is_dataclass(kind):
        return _read_dataclass(kind, value, key)
    return _read_scalar(kind, value, key)


def plain(value: Any) -> Any:
    """The inverse of `read`: dataclasses become mappings, tuples become lists."""
    if dataclasses.is_dataclass(value):
        return {key_of(f.name): plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def key_of(field: str) -> str:
    """The key of a field: its name, without the trailing underscore that avoids a Python keyword, as in `class_`."""
    return field.removesuffix("_")


def default_of(field: dataclasses.Field) -> Any:
    """A field's default; `dataclasses.MISSING` if it has none."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def flatten(tree: Any, key: str = "") -> dict[str, Any]:
    """Nested plain settings as one level of dotted keys, such as `architecture.stacks.0.layers`; lists of scalars stay values."""
    if isinstance(tree, Mapping):
        items = tree.items()
    elif isinstance(tree, list) and any(isinstance(item, Mapping) for item in tree):
        items = enumerate(tree)
    else:
        return {key: tree}
    return {dotted: value for name, item in items for dotted, value in flatten(item, f"{key}.{name}" if key else str(name)).items()}


def differing_fields(before: Any, after: Any) -> Differences:
    """The differences between two nested plain mappings: dotted keys with both values, None where a key is missing."""
    old, new = flatten(before), flatten(after)
    return {key: (old.get(key), new.get(key)) for key in {**old, **new} if old.get(key) != new.get(key)}


def _read_dataclass(kind: Any, value: Any, key: str) -> Any:
    if not isinstance(value, Mapping):
        raise _wrong_type(key, value, f"a mapping with the keys {listed(_names(kind))}")
    hints = typing.get_type_hints(kind, include_extras=True)
    fields = {key_of(f.name): f for f in dataclasses.fields(kind)}
    for name in value:
        if name not in fields:
            raise ParamsError(f"{_join(key, name)}: unknown key; the keys here are {listed(fields)}{nearest(name, fields)}")
    for name, field in fields.items():
        if default_of(field) is dataclasses.MISSING and name not in value:
            raise ParamsError(f"{_join(key, name)}: missing; {_remedy(hints[field.name])}")
    built = {}
    for name, item in value.items():
        field = fields[name]
        built[field.name] = _read(hints[field.name], _with_kind(item, field.default), _join(key, name))
    try:
        return kind(**built)
    except ParamsError as error:  # from the section's own consistency checks
        raise ParamsError(f"{key}: {error}" if key else str(error)) from None


def _with_kind(value: Any, default: Any) -> Any:
    """A section without `kind` gets the kind of the default."""
    kind = getattr(default, "kind", None)
    return {"kind": kind, **value} if kind and isinstance(value, Mapping) else value


def _read_union(members: tuple[Any, ...], value: Any, key: str) -> Any:
    """Read `X | None`, or one of several dataclasses by its `kind` field."""
    if value is None and type(None) in members:
        return None
    members = tuple(member for member in members if member is not type(None))
    if len(members) == 1:
        return _read(members[0], value, key)
    kinds = {typing.get_args(typing.get_type_hints(member)["kind"])[0]: member for member in members}
    if not isinstance(value, Mapping):
        raise _wrong_type(key, value, f"a mapping with a `kind` out of {listed(kinds)}")
    name = value.get("kind")
    if not isinstance(name, str) or name not in kinds:
        raise ParamsError(
            f"{_join(key, 'kind')}: {shown(name)} is not allowed; choose one of {listed(kinds)}{nearest(name, kinds)}"
        )
    for stray in value:
        owners = [kind for kind, member in kinds.items() if stray in _names(member)]
        if owners and name not in owners:
            raise ParamsError(
                f"{_join(key, stray)}: unknown key of kind {name}, whose keys are {listed(_names(kinds[name]))}; it is one of kind "
                f"{listed(owners)}"
            )
    return _read(kinds[name], value, key)


def _names(kind: Any) -> list[str]:
    return [key_of(field.name) for field in dataclasses.fields(kind)]


def _read_scalar(kind: Any, value: Any, key: str) -> Any:
    if isinstance(value, bool) != (kind is bool) or not isinstance(value, (int, float) if kind is float else kind):
        raise _wrong_type(key, value, {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}[kind])
    if kind in (int, float) and isinstance(value, int) and abs(value) > LARGEST_INT:
        raise ParamsError(f"{key}: {shown(value)} is not allowed; the largest whole number is 2**63 - 1")
    if kind is float:
        if value and not FLOAT32[0] <= abs(value) <= FLOAT32[1]:  # also true for NaN
            low, high = FLOAT32
            raise ParamsError(f"{key}: {value!r} is not allowed; float32 holds 0 and magnitudes from {low:.2g} to {high:.2g}")
        return value + 0.0  # an int becomes a float, and -0.0 is 0.0
    if isinstance(value, str) and not _encodable(value):
        raise ParamsError(f"{key}: {shown(value)} is not allowed; a text holds neither NUL nor half of a surrogate pair")
    return value


def _read_plain(value: Any, key: str) -> Any:
    """Read a value of any JSON type: no dates or bytes, and no number that a tensor cannot hold."""
    if isinstance(value, Mapping):
        return _read(dict[str, Any], value, key)
    if isinstance(value, (list, tuple)):
        return [_read_plain(item, f"{key}[{i}]") for i, item in enumerate(value)]
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return _read_scalar(kind, value, key)
    if value is not None:
        raise _wrong_type(key, value, "a number, a text, true or false, null, a list or a mapping")
    return None


def _encodable(text: str) -> bool:
    """Whether the text is valid in file names, JSON files and command lines."""
    try:
        return b"\0" not in text.encode()
    except UnicodeEncodeError:
        return False


def _remedy(kind: Any) -> str:
    """What to write for a key that is missing."""
    if dataclasses.is_dataclass(kind) and all(default_of(f) is not dataclasses.MISSING for f in dataclasses.fields(kind)):
        return "write {} for its defaults"
    return "it has no default"


def _join(key: str, name: object) -> str:
    name = name if isinstance(name, str) else shown(name)
    return f"{key}.{name}" if key else name


def listed(names: typing.Iterable[object]) -> str:
    return ", ".join(str(name) for name in names)


def nearest(name: object, names: typing.Iterable[object]) -> str:
    """A hint for an unknown name: its new name if it was renamed, or the known name with the most similar spelling."""
    known = [str(one) for one in names]
    if isinstance(name, str) and RENAMED.get(name) in known:
        return f" (`{name}` is `{RENAMED[name]}` now)"
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5) if isinstance(name, str) else []
    return f" (did you mean `{close[0]}`?)" if close else ""


class _Short(reprlib.Repr):
    """Shortened `repr` of values: a number may have thousands of digits, a list thousands of items."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 100

    def repr_int(self, x: int, level: int) -> str:
        return super().repr_int(x, level) if x.bit_length() < 10_000 else f"an integer of {x.bit_length():,} bits"


shown = _Short().repr


def _wrong_type(key: str, value: Any, wanted: str) -> ParamsError:
    integral = isinstance(value, float) and value.is_integer() and abs(value) <= LARGEST_INT
    whole = f"; write {int(value)}" if integral and wanted == "a whole number" else ""
    got = f"expected {wanted}, got {shown(value)} ({type(value).__name__}){whole}"
    return ParamsError(f"{key}: {got}" if key else got)
