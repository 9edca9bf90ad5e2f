"""The whole of `params.yaml`: reading it, changing single values, and the checks that span sections."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stacklm.config.data import Data
from stacklm.config.evaluate import Evaluate
from stacklm.config.model import Model
from stacklm.config.schema import ParamsError, listed, nearest, read
from stacklm.config.tokenizer import TokenizerConfig
from stacklm.config.train import Train, check_team
from stacklm.files import write_text

PARAMS_FILE = "params.yaml"


@dataclass(frozen=True)
class Params:
    """Every setting of a project."""

    data: Data
    tokenizer: TokenizerConfig
    train: Train
    models: dict[str, Model]
    evaluate: Evaluate = field(default_factory=Evaluate)

    def __post_init__(self) -> None:
        if not self.models:
            raise ParamsError("models: {} is not allowed; name at least one model")
        for name in self.models:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
                raise ParamsError(f"models.{name}: a model's name is letters, digits, `_` and `-` (it names files and stages)")
        for name, model in self.models.items():
            _check_team(name, model, self.train)
            if model.optimizer.in_backward:
                _check_in_backward(f"models.{name}.optimizer.in_backward", self.train)
        # A byte-level token is at least one byte, so the text bounds the stream before it is read.
        most = getattr(self.data.source, "max_bytes", None)
        share = min(self.data.valid_fraction, self.data.test_fraction)
        if most is not None and self.train.context > most * share:
            raise ParamsError(
                f"train.context: {self.train.context} is longer than the smallest split of the data can be "
                f"(data.source.max_bytes {most} * {share} = {int(most * share)} bytes)"
            )


def _check_team(name: str, model: Model, train: Train) -> None:
    try:
        check_team(train, model.optimizer, train.processes)
    except ParamsError as error:
        raise ParamsError(f"train.{error} (models.{name})") from None


def _check_in_backward(key: str, train: Train) -> None:
    if train.micro_batch != train.batch_size:
        raise ParamsError(
            f"{key}: true keeps no gradients, so none can be accumulated: train.micro_batch = {train.micro_batch} must be "
            f"train.batch_size = {train.batch_size}"
        )
    if train.clip_norm is not None:
        raise ParamsError(
            f"{key}: true updates before all gradients are there, so they cannot be clipped by their norm: train.clip_norm = "
            f"{train.clip_norm:g} must be null"
        )


def load(path: Path) -> Params:
    """Read and check a params file. Raises `ParamsError` with the place of the first thing wrong."""
    return parse(_load_yaml(path), path.name)


def parse(tree: Any, name: str = PARAMS_FILE) -> Params:
    """Check a plain mapping, as read from a file called `name`."""
    try:
        return read(Params, tree)
    except ParamsError as error:
        raise ParamsError(f"{name}: {error}") from None


def section(params: Params, key: str) -> Any:
    """The part of the settings at a dotted key, such as `train` or `models.dense`."""
    value: Any = params
    for name in key.split("."):
        value = value[name] if isinstance(value, Mapping) else getattr(value, name)
    return value


def set_values(path: Path, assignments: Iterable[str]) -> Params:
    """Write `key.path=value` assignments into a params file, keeping its comments and order.

    The result is checked as a whole before anything is written. A key that the file leaves at its default may be
    set too. Raises `ParamsError` as `load` does, or where an assignment is not of the form `key=value`.
    """
    params, text = _with_values(path, assignments)
    write_text(path, text)
    return params


def preview(path: Path, assignments: Iterable[str]) -> Params:
    """What `set_values` would make of a params file, which stays as it is. Raises the same errors."""
    return _with_values(path, assignments)[0]


def _with_values(path: Path, assignments: Iterable[str]) -> tuple[Params, str]:
    from ruamel.yaml import YAML

    yaml = YAML()  # the round-trip kind: comments survive
    yaml.width = 4096
    tree = yaml.load(path.read_text(encoding="utf-8"))
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key:
            raise ParamsError(f"--set {assignment!r}: write it as key=value, such as train.steps=200")
        _assign(tree, key.split("."), _load_yaml_text(text, assignment), assignment)
    buffer = io.StringIO()
    yaml.dump(tree, buffer)
    return parse(tree, path.name), buffer.getvalue()


def _assign(tree: Any, names: list[str], value: Any, assignment: str) -> None:
    for i, name in enumerate(names[:-1]):
        if isinstance(tree, list):
            tree = _item(tree, name, assignment)
        else:
            if not isinstance(tree.get(name), (dict, list)):
                if i == 0:  # a new section is always a slip; below it, a section at its defaults may be missing
                    known = list(tree)
                    hint = f"choose one of {listed(known)}{nearest(name, known)}"
                    raise ParamsError(f"--set {assignment}: unknown section `{name}`; {hint}")
                tree[name] = {}
            tree = tree[name]
    if isinstance(tree, list):
        _item(tree, names[-1], assignment)
        tree[int(names[-1])] = value
    else:
        tree[names[-1]] = value


def _item(tree: list, name: str, assignment: str) -> Any:
    if not name.isdecimal() or int(name) >= len(tree):
        raise ParamsError(f"--set {assignment}: `{name}` is no index of a list of {len(tree)}")
    return tree[int(name)]


def _load_yaml(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ParamsError(f"{path}: no such file; run this inside a stacklm project (its top level holds {PARAMS_FILE})") from None
    return _load_yaml_text(text, path.name)


def _load_yaml_text(text: str, name: str) -> Any:
    """YAML 1.2, as DVC reads it: `1e-3` is a number and `no` is a text."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        return YAML(typ="safe", pure=True).load(text)
    except YAMLError as error:
        raise ParamsError(f"{name}: not valid YAML: {error}") from None
