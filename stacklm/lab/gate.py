"""A significance gate: a model that the user names against a baseline, as an experiment that declares its looks beforehand."""

from __future__ import annotations

import dataclasses
import io
import re
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from stacklm.config.model import Dense, Model
from stacklm.config.optimizer import Optimizer
from stacklm.config.params import NAME_PATTERN, Params, assign, load_plain, read_value
from stacklm.config.schema import ParamsError, default_of, differing_fields, key_of, listed, nearest, plain, read
from stacklm.config.train import Train
from stacklm.lab.budget import Axis, cost, fitted, mismatch
from stacklm.lab.experiment import Candidate, Experiment, Seeds, settings
from stacklm.model.custom import model_named

SECTIONS = ("architecture", "optimizer", "settings", "train")
TUNE = (101,)
"""The seed that learning rates are tuned with; those that judge are counted from 1."""
MOST_HEADS = 1024
EXIT_CODES = {"better": 0, "not worse": 3, "worse": 4, "no verdict": 5}
"""Of the command, for scripts; errors have 2."""


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


def find_baseline(name: str | None, params: Params) -> Named:
    """The model of that name, by default the first dense one. Raises `ParamsError` naming what there is."""
    if name is not None and name not in params.models:
        raise ParamsError(f"--baseline {name}: no such model; the models are {listed(params.models)}{nearest(name, params.models)}")
    dense = (key for key, model in params.models.items() if isinstance(model.architecture, Dense))
    chosen = name or next(dense, None)
    if chosen is None:
        raise ParamsError(f"no dense model in params.yaml to compare with; name one by --baseline: {listed(params.models)}")
    return Named(chosen, params.models[chosen])


def find_candidate(target: str, params: Params, optimizer: Optimizer) -> Named:
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


def of_steps(steps: int, train: Train) -> dict[str, Any]:
    """Settings of a training of that many steps, with no longer a warm-up than a tenth of it."""
    return {"max_steps": steps, "hard_stop": None, "warmup_steps": min(train.warmup_steps, steps // 10)}


def gate(
    candidate: Named,
    baseline: Named,
    params: Params,
    budget: Axis,
    margin: float,
    rates: int,
    looks: tuple[int, ...],
    train: dict[str, Any] | None,
) -> Experiment:
    """The experiment that settles whether the candidate beats the baseline, which is brought to the candidate's budget.

    The candidate stays exactly as it is. Raises `ParamsError` where it is the baseline, which else must meet its budget.
    """
    if candidate.model == baseline.model:
        raise ParamsError(f"{baseline.name} is the baseline itself; name another one by --baseline, or change a setting by --set")
    ours, theirs = (plain(one.model) for one in (candidate, baseline))
    differs = {key.partition(".")[0] for key in differing_fields(ours, theirs) if key != "optimizer.peak_lr"}
    equal = budget.replace("_", " ")
    experiment = Experiment(
        question=f"Does {candidate.name} need fewer bits per byte than {baseline.name} at equal {equal}?",
        refuted_by="the interval of the difference lies above zero",
        budget=budget,
        margin=margin,
        baseline=baseline.model,
        candidates={candidate.name: Candidate(model=candidate.model, differs=tuple(sorted(differs)), fit=False)},
        seeds=Seeds(TUNE, tuple(range(1, 1 + looks[-1])), looks),
        rates=rates,
        train=train,
    )
    matching = matched(baseline.model, candidate.model, settings(experiment, params), params.tokenizer.vocab_size, budget)
    return read(Experiment, plain(replace(experiment, baseline=matching)))  # with all checks of a file's


def matched(baseline: Model, candidate: Model, train: Train, vocab_size: int, axis: Axis) -> Model:
    """The baseline at the candidate's size: a dense one gets the width that comes nearest, in whole heads, then its d_ff is fitted.

    On the axes `tokens` and `seconds` it stays as it is. Raises `ParamsError` where it cannot come near enough.
    """
    if axis not in ("parameters", "training_flops"):
        return baseline
    target = cost(candidate, train, vocab_size)

    def off(model: Model) -> float:
        return mismatch(cost(model, train, vocab_size), target)[axis]

    near = [baseline]
    if isinstance(dense := baseline.architecture, Dense):
        above = 1 + bisect_left(range(1, MOST_HEADS), 0, key=lambda heads: off(_with_heads(baseline, dense, heads)))
        near = [_with_heads(baseline, dense, heads) for heads in {max(1, above - 1), above}]
    near.sort(key=lambda model: abs(off(model)))
    for model in near[:-1]:
        with suppress(ParamsError):
            return fitted("baseline", model, train, vocab_size, target, axis)[0]
    return fitted("baseline", near[-1], train, vocab_size, target, axis)[0]


def _with_heads(model: Model, dense: Dense, heads: int) -> Model:
    """That many heads of the same dim, and all widths in proportion."""
    d_model, d_ff = dense.d_model // dense.n_heads * heads, max(1, round(dense.d_ff * heads / dense.n_heads))
    return replace(model, architecture=replace(dense, d_model=d_model, n_heads=heads, d_ff=d_ff))


def written(experiment: Experiment, head: str) -> str:
    """The experiment as its file holds it, below a comment: all that is not a default."""
    yaml, buffer = YAML(), io.StringIO()
    yaml.default_flow_style, yaml.width = None, 120
    yaml.dump(stated(experiment), buffer)
    return f"# {head}\n{buffer.getvalue()}"


def stated(value: Any) -> Any:
    """`plain` without the fields that have their default, but with every `kind`, as the first key."""
    if isinstance(value, Mapping):
        return {name: stated(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [stated(item) for item in value]
    if not dataclasses.is_dataclass(value):
        return value
    kept = {"kind": kind} if (kind := getattr(value, "kind", None)) else {}
    for field in dataclasses.fields(value):
        if (own := getattr(value, field.name)) != default_of(field):
            kept[key_of(field.name)] = stated(own)
    return kept
