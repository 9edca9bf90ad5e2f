"""All of `params.yaml`: reading it, changing single values, and checks across sections."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stacklm.config.data import Data
from stacklm.config.evaluate import Evaluate
from stacklm.config.model import DEEPEST as DEEPEST_MODEL
from stacklm.config.model import Model
from stacklm.config.schema import Natural, ParamsError, read, shown
from stacklm.config.tokenizer import TokenizerConfig
from stacklm.config.train import Train, check_team
from stacklm.files import write_text

PARAMS_FILE = "params.yaml"
LARGEST_FILE = 2**20
"""Maximum bytes of a params file."""
DEEPEST = 32
"""Maximum nesting of mappings and lists in a params file."""
LONGEST_NAME = 64
"""Maximum characters of a model's name, which is used in file names, with prefixes, hashes and suffixes."""
NAME_PATTERN = "[A-Za-z][A-Za-z0-9_-]*"
OTHERWISE_READ = frozenset(["y", "n", "yes", "no", "on", "off", "true", "false", "null", "nan", "inf"])
"""Words that a YAML 1.1 or 1.2 parser does not read as strings."""
DEVICES = frozenset(["con", "prn", "aux", "nul", *(f"{port}{i}" for port in ("com", "lpt") for i in range(10))])
"""Names that no file can have on Windows."""


@dataclass(frozen=True)
class Params:
    """Every setting of a project."""

    data: Data
    """Where the text comes from and how it is split."""
    tokenizer: TokenizerConfig
    """The vocabulary."""
    train: Train
    """The budget and schedule shared by all models, and the hardware that a run uses."""
    models: dict[str, Model]
    """What is compared, one named entry each."""
    seeds: tuple[Natural, ...]
    """Each model is trained once per seed, which determines initial weights and sequence order. A verdict needs three."""
    evaluate: Evaluate
    """How a trained model is judged and sampled."""

    def __post_init__(self) -> None:
        if not self.models:
            raise ParamsError("models: {} is not allowed; name at least one model")
        _check_names(self.models)
        if not self.seeds or len({*self.seeds}) < len(self.seeds):
            raise ParamsError(f"seeds: {shown(list(self.seeds))} is not allowed; write different whole numbers, at least one")
        for name, model in self.models.items():
            _check_depth(name, model, self.train.context_length)
            _check_team(name, model, self.train)
            if model.optimizer.optimizer_in_backward:
                _check_in_backward(f"models.{name}.optimizer.optimizer_in_backward", self.train)
        # A byte-level token is at least one byte, so the text bounds the stream before it is read.
        most = getattr(self.data.source, "max_bytes", None)
        share = min(self.data.valid_fraction, self.data.test_fraction)
        if most is not None and self.train.context_length > most * share:
            raise ParamsError(
                f"train.context_length: {self.train.context_length} is longer than the smallest split of the data can be "
                f"(data.source.max_bytes {most} * {share} = {int(most * share)} bytes)"
            )


def _check_names(names: Iterable[str]) -> None:
    """Check model names, which are used in file names, stage names and keys that DVC looks up."""
    folded: dict[str, str] = {}
    for name in names:
        key = f"models.{name[: 2 * LONGEST_NAME]}"
        if not re.fullmatch(NAME_PATTERN, name):
            raise ParamsError(f"{key}: a model's name begins with a letter; after it come letters, digits, `_` and `-`")
        if len(name) > LONGEST_NAME:
            raise ParamsError(f"{key}: a model's name has at most {LONGEST_NAME} characters, not {len(name)}")
        if name.lower() in OTHERWISE_READ | DEVICES:
            raise ParamsError(f"{key}: reserved, by YAML or as a file name; choose another name")
        if folded.setdefault(name.lower(), name) != name:
            raise ParamsError(f"{key}: equals {folded[name.lower()]} but for case, which not every file system tells apart")


def _check_depth(name: str, model: Model, context: int) -> None:
    depth = model.architecture.depth(context)
    if depth is not None and depth > DEEPEST_MODEL:
        raise ParamsError(
            f"models.{name}.architecture: {depth} stacks in series at train.context_length {context}, above {DEEPEST_MODEL}"
        )


def _check_team(name: str, model: Model, train: Train) -> None:
    try:
        check_team(train, model.optimizer, train.nproc)
    except ParamsError as error:
        raise ParamsError(f"train.{error} (models.{name})") from None


def _check_in_backward(key: str, train: Train) -> None:
    if train.micro_batch_size != train.global_batch_size:
        raise ParamsError(
            f"{key}: true keeps no gradients, so none can be accumulated: "
            f"train.micro_batch_size = {train.micro_batch_size} must be train.global_batch_size = {train.global_batch_size}"
        )
    if train.max_grad_norm is not None:
        raise ParamsError(
            f"{key}: true updates before all gradients are there, so they cannot be clipped by their norm: train.max_grad_norm = "
            f"{train.max_grad_norm:g} must be null"
        )


def load(path: Path) -> Params:
    """Read and check a params file. Raises `ParamsError` with the location of the first error."""
    return _parse_file(load_plain(path), path.name)


def load_plain(path: Path) -> Any:
    """The mappings, lists and scalars of a YAML file, unchecked. Raises `ParamsError` with the location of anything else."""
    return _load_yaml(_read_text(path), path.name)


def parse(tree: Any, name: str = PARAMS_FILE) -> Params:
    """Check a plain mapping, as read from a file called `name`."""
    try:
        return read(Params, tree)
    except ParamsError as error:
        raise ParamsError(f"{name}: {error}") from None


def _parse_file(tree: Any, name: str) -> Params:
    """`parse`, for a file, which must not have `train.seed`: each training run takes one of its `seeds`."""
    if isinstance(tree, dict) and isinstance(tree.get("train"), dict) and "seed" in tree["train"]:
        raise ParamsError(f"{name}: train.seed: write `seeds: [{shown(tree['train']['seed'])}]` beside `models` instead")
    return parse(tree, name)


def section(params: Params, key: str) -> Any:
    """The part of the settings at a dotted key, such as `train` or `models.dense`."""
    value: Any = params
    for name in key.split("."):
        value = value[name] if isinstance(value, Mapping) else getattr(value, name)
    return value


def set_values(path: Path, assignments: Iterable[str]) -> Params:
    """Write `key.path=value` assignments into a params file, keeping its comments and order.

    The whole result is checked before anything is written. Keys that are missing from the file may be set too. Raises `ParamsError`
    as `load` does, or if an assignment is not of the form `key=value`.
    """
    params, text = _with_values(path, assignments)
    write_text(path, text)
    return params


def preview(path: Path, assignments: Iterable[str]) -> Params:
    """The result of `set_values`, without writing the file. Raises the same errors."""
    return _with_values(path, assignments)[0]


def _with_values(path: Path, assignments: Iterable[str]) -> tuple[Params, str]:
    from ruamel.yaml import YAML

    text = _read_text(path)
    tree = _load_yaml(text, path.name)
    if not isinstance(tree, dict):
        parse(tree, path.name)  # raises the same error as without assignments
    yaml = YAML(pure=True)  # the round-trip kind: comments survive
    yaml.width = 4096
    tree = yaml.load(text)
    for assignment in assignments:
        key, value = read_value(assignment)
        assign(tree, key.split("."), value, f"--set {assignment}")
    buffer = io.StringIO()
    yaml.dump(tree, buffer)
    changed = buffer.getvalue()
    return _parse_file(_load_yaml(changed, path.name), path.name), changed


def read_value(assignment: str) -> tuple[str, Any]:
    """Key and value of `key.path=value`. Raises `ParamsError` if it is not of that form."""
    key, equals, value = assignment.partition("=")
    if not equals or not all(key.split(".")):
        raise ParamsError(f"--set {assignment!r}: write it as key=value, such as train.max_steps=200")
    return key, _load_yaml(value, f"--set {assignment}")


def assign(tree: Any, names: list[str], value: Any, where: str) -> None:
    """Set a value in nested mappings and lists; missing mappings on the way are created."""
    name: Any
    for i, name in enumerate(names):
        last = i == len(names) - 1
        if isinstance(tree, list):
            if not (name.isascii() and name.isdecimal()) or int(name) >= len(tree):
                raise ParamsError(f"{where}: `{name}` is not an index of a list of {len(tree)}")
            name = int(name)
        elif not isinstance(tree, dict):
            raise ParamsError(f"{where}: `{'.'.join(names[:i])}` is {shown(tree)}, which has no keys")
        elif not last and tree.get(name) is None:
            tree[name] = {}
        if last:
            tree[name] = value
        tree = tree[name]


def _read_text(path: Path) -> str:
    """The text of a params file. Raises `ParamsError` if it cannot be read."""
    try:
        if path.exists() and not path.is_file():
            raise ParamsError(f"{path}: not a regular file")
        if path.stat().st_size > LARGEST_FILE:
            raise ParamsError(f"{path}: {path.stat().st_size:,} bytes; a params file has at most {LARGEST_FILE:,}")
        data = path.read_bytes()
    except FileNotFoundError:
        raise ParamsError(f"{path}: no such file; run this inside a stacklm project (its top level holds {PARAMS_FILE})") from None
    except OSError as error:
        raise ParamsError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ParamsError(f"{path}: line {line}: byte 0x{data[error.start]:02x} is not UTF-8; save the file as UTF-8") from None


def _load_yaml(text: str, name: str) -> Any:
    """Load YAML 1.2, as DVC reads it: `1e-3` is a number and `no` is a string.

    `name` is the source named in messages. Raises `ParamsError` for anything but plain data: aliases (which may expand without
    limit or contain themselves), tags, directives, several documents, nesting beyond `DEEPEST`.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    try:
        depth = 0
        for event in YAML(typ="safe", pure=True).parse(text):
            depth = _check_event(event, depth)
        return YAML(typ="safe", pure=True).load(text)
    except ParamsError as error:
        raise ParamsError(f"{name}: {error}") from None
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise ParamsError(f"{name}: line {mark.line + 1}, column {mark.column + 1}: not valid YAML: {error.problem}") from None
    except (
        YAMLError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        IndexError,
    ) as error:  # from a date, a number, a key that is a mapping
        raise ParamsError(f"{name}: not valid YAML: {error}") from None


def _check_event(event: Any, depth: int) -> int:
    """The nesting depth after an event of ruamel's parser. Raises `ParamsError` for one that does not occur in plain data."""
    from ruamel.yaml import events

    line = f"line {event.start_mark.line + 1}"
    if isinstance(event, events.AliasEvent) or getattr(event, "anchor", None):
        raise ParamsError(f"{line}: anchors and aliases (`&`, `*`) are not supported; write the values out")
    if getattr(event, "ctag", None):
        raise ParamsError(f"{line}: tags such as `{event.tag}` are not supported; settings are plain values")
    if isinstance(event, events.DocumentStartEvent) and (event.version or event.tags):
        raise ParamsError(f"{line}: directives such as %YAML are not supported; the file is read as YAML 1.2")
    if isinstance(event, events.CollectionStartEvent):
        depth += 1
    elif isinstance(event, events.CollectionEndEvent):
        depth -= 1
    if depth > DEEPEST:
        raise ParamsError(f"{line}: nested more than {DEEPEST} deep")
    return depth
