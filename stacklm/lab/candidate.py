"""The model that a user names on the command line, with changed settings, and the baseline that it is compared with."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stacklm.config.model import Dense, Model
from stacklm.config.optimizer import Optimizer
from stacklm.config.params import NAME_PATTERN, Params, assign, load_plain, read_value
from stacklm.config.schema import ParamsError, listed, nearest, plain, read
from stacklm.model.custom import model_named

SECTIONS = ("architecture", "optimizer", "settings", "train")


@dataclass(frozen=True)
class Named:
    """A model with the name that it has in texts and files."""

    name: str
    model: Model

    def __post_init__(self) -> None:
        if not re.fullmatch(NAME_PATTERN, self.name) or self.name == "baseline":
            raise ParamsError(
                f"{self.name!r} cannot be the name of a model: it begins with a letter, after which come letters, "
                "digits, `_` and `-`; nor is it `baseline`"
            )


def baseline(name: str | None, params: Params) -> Named:
    """The model of that name, by default the first dense one. Raises `ParamsError` naming what there is."""
    if name is not None and name not in params.models:
        raise ParamsError(f"--baseline {name}: no such model; the models are {listed(params.models)}{nearest(name, params.models)}")
    dense = (key for key, model in params.models.items() if isinstance(model.architecture, Dense))
    chosen = name or next(dense, None)
    if chosen is None:
        raise ParamsError(f"no dense model in params.yaml to compare with; name one by --baseline: {listed(params.models)}")
    return Named(chosen, params.models[chosen])


def candidate(target: str, params: Params, optimizer: Optimizer) -> Named:
    """A model of the settings by its name, the one of a YAML file, or a class of a Python file, `my_model.py:Mine`.

    One of a file has that `optimizer`, unless it says another. Raises `ParamsError` naming what there is, and where a Python
    file has several models and none is named.
    """
    path, _, name = target.partition(".py:")
    file = Path(f"{path}.py" if name else target)
    if file.suffix in (".yaml", ".yml"):
        tree = load_plain(file)
        model = read(Model, tree, file.name)
        return Named(file.stem, model if "optimizer" in tree else replace(model, optimizer=optimizer))
    if file.suffix == ".py":
        return Named(file.stem, Model(model_named(str(file.absolute()) + (f":{name}" if name else ""), {}), optimizer))
    if target not in params.models:
        known = f"the models are {listed(params.models)}{nearest(target, params.models)}"
        raise ParamsError(f"no model {target!r} in params.yaml, and neither a .py nor a .yaml file; {known}")
    return Named(target, params.models[target])


def changed(named: Named, assignments: Iterable[str]) -> tuple[Named, dict[str, Any]]:
    """The model with `KEY=VALUE` assignments, and those to `train`; `settings.x` is short for `architecture.settings.x`.

    Raises `ParamsError` for a key that there is not, and for a value that cannot be.
    """
    tree = {**plain(named.model), "train": {}}
    for assignment in assignments:
        first, *rest = assignment.partition("=")[0].split(".")
        if not ("=" in assignment and all(rest) and rest and first in SECTIONS):
            raise ParamsError(f"--set {assignment}: write KEY=VALUE with a key that begins with {listed(SECTIONS)} and a dot")
        _, value = read_value(assignment)
        assign(tree, ["architecture"] * (first == "settings") + [first, *rest], value, f"--set {assignment}")
    train = tree.pop("train")
    return Named(named.name, read(Model, tree, named.name)), train
