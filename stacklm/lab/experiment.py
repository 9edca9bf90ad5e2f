"""An experiment, `experiments/NAME.yaml`: a baseline, candidates, the budget held equal, seeds, and a refutation criterion."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

from stacklm.config.model import Model
from stacklm.config.params import Params, assign, load_plain
from stacklm.config.schema import (
    Differences,
    ParamsError,
    Positive,
    Range,
    default_of,
    differing_fields,
    flatten,
    key_of,
    listed,
    plain,
    read,
)
from stacklm.config.train import Train
from stacklm.lab import probes
from stacklm.lab.budget import CLOSE, Axis, Cost, cost, fitted, mismatch, scaled


@dataclass(frozen=True)
class Candidate:
    """Either the baseline with declared changes, `change: {architecture.conv_size: 4}`, or a whole `model`.

    A whole model declares in `differs` the keys in which it differs from the baseline; a key includes all keys below it. With
    `fit: false` its d_ff is not adjusted, and it must meet the budget unchanged.
    """

    change: dict[str, Any] | None = None
    model: Model | None = None
    differs: tuple[str, ...] = ("architecture",)
    fit: bool = True

    def __post_init__(self) -> None:
        if (self.change is None) == (self.model is None):
            raise ParamsError("write either `change`, keys of the baseline with new values, or `model`")


@dataclass(frozen=True)
class Seeds:
    """Seeds: `tune` for tuning learning rates on the valid set, `judge` for the verdict on the test set.

    With `looks`, increasing numbers of judging seeds, verdicts are computed after that many seeds, and training stops once every
    candidate has one. The error rate holds over all looks.
    """

    tune: tuple[Annotated[int, Range(0)], ...]
    judge: tuple[Annotated[int, Range(0)], ...]
    looks: tuple[Annotated[int, Range(3)], ...] = ()

    def __post_init__(self) -> None:
        for name, seeds in (("tune", self.tune), ("judge", self.judge)):
            if twice := sorted({seed for seed in seeds if seeds.count(seed) > 1}):
                raise ParamsError(f"{name}: repeated seeds {listed(twice)}; list each seed once")
        if len(self.judge) < 3:
            raise ParamsError(f"judge: {len(self.judge)} seeds are too few for a verdict; at least 3 are needed")
        growing = all(a < b for a, b in pairwise(self.looks))
        if self.looks and not (growing and self.looks[-1] == len(self.judge)):
            raise ParamsError(
                f"looks: {listed(self.looks)} must increase from at least 3 to the number of seeds in `judge`, {len(self.judge)}"
            )
        if shared := sorted({*self.tune} & {*self.judge}):
            raise ParamsError(f"tune and judge share {listed(shared)}; the verdict needs seeds that were not used for tuning")


@dataclass(frozen=True)
class Experiment:
    """`sizes` multiply all widths; `train` overrides keys of the project's section `train`.

    Without candidates it is an A/A test of the baseline, which needs no tuning.
    """

    question: str
    refuted_by: str
    budget: Axis
    margin: Annotated[float, Range(0, 0.2, open_low=True)]
    baseline: Model
    candidates: dict[str, Candidate]
    seeds: Seeds
    sizes: tuple[Positive, ...] = (1.0,)
    rates: Annotated[int, Range(3, 15)] = 5
    train: dict[str, Any] | None = None
    probe: probes.Probe | None = None
    """A synthetic task instead of the project's text."""

    def __post_init__(self) -> None:
        if self.candidates and not self.seeds.tune:
            raise ParamsError("seeds.tune: [] is not allowed; learning rates need at least one seed")
        if "baseline" in self.candidates:
            raise ParamsError("candidates.baseline: this name is reserved for the baseline; choose another one")
        if not self.sizes or len({*self.sizes}) < len(self.sizes):
            raise ParamsError(f"sizes: {listed(self.sizes) or '[]'} must be different numbers, at least one")


@dataclass(frozen=True)
class Arm:
    """One model at one size, with the shape that meets the budget, and its costs."""

    name: str
    size: float
    model: Model
    train: Train
    """The settings of its training runs, except the seed."""
    cost: Cost
    mismatch: dict[str, float]
    changed: Differences
    """The keys in which it differs from the baseline of the same size, with both values."""

    @property
    def key(self) -> str:
        return f"{self.name} {self.size:g}"

    @property
    def warning(self) -> str | None:
        """A warning if the budget is met, but not within 1%."""
        axis, off = max(self.mismatch.items(), key=lambda item: abs(item[1]), default=("", 0.0))
        return f"{self.name} at size {self.size:g}: {axis} {off:+.1%} from the baseline's" if abs(off) > CLOSE else None


def load_experiment(path: Path) -> Experiment:
    """Read and check an experiment's file. Raises `ParamsError` with file and key."""
    tree = load_plain(path)
    try:
        return read(Experiment, tree)
    except ParamsError as error:
        raise ParamsError(f"{path.name}: {error}") from None


def arms(experiment: Experiment, params: Params, speeds: Mapping[str, float] | None = None) -> list[Arm]:
    """The baseline and all candidates at every size, with shapes that meet the budget.

    On the axis `seconds` the number of steps is fitted instead: `speeds` are measured seconds per step by `Arm.key`. Without
    them all arms have the baseline's number of steps.

    Raises `ParamsError` for an arm that cannot meet the budget, for a change of an unknown key, and for an undeclared difference
    from the baseline.
    """
    train, probe = settings(experiment, params), experiment.probe
    vocab_size = probes.vocab_size(probe) if probe else params.tokenizer.vocab_size
    found = []
    for size in experiment.sizes:
        baseline = replace(experiment.baseline, architecture=scaled(experiment.baseline.architecture, size))
        target = cost(baseline, train, vocab_size)
        found.append(Arm("baseline", size, baseline, train, target, {experiment.budget: 0.0}, {}))
        for name, candidate in experiment.candidates.items():
            model = candidate.model or changed(experiment.baseline, candidate.change or {}, f"candidates.{name}.change")
            model = replace(model, architecture=scaled(model.architecture, size))
            own, off = _as_long(train, name, size, speeds) if experiment.budget == "seconds" and speeds else (train, 0.0)
            model, reached = fitted(f"candidates.{name}", model, own, vocab_size, target, experiment.budget, candidate.fit)
            differences = differing_fields(plain(baseline), plain(model))
            _check_declared(name, candidate, differences)
            held = {experiment.budget: mismatch(reached, target).get(experiment.budget, off)}
            found.append(Arm(name, size, model, own, reached, held, differences))
    return found


def _as_long(train: Train, name: str, size: float, speeds: Mapping[str, float]) -> tuple[Train, float]:
    """The settings with the number of steps that takes as long as the baseline's, and the relative mismatch."""
    ratio = speeds[f"baseline {size:g}"] / speeds[f"{name} {size:g}"]
    steps = max(1, round(train.max_steps * ratio))
    if train.warmup_steps >= steps or train.hard_stop:
        raise ParamsError(
            f"candidates.{name}: in the time of the baseline's {train.max_steps} steps it takes {steps}; with the budget `seconds` "
            f"that must be more than train.warmup_steps = {train.warmup_steps}, and train.hard_stop must be null"
        )
    return replace(train, max_steps=steps), steps / (train.max_steps * ratio) - 1


def settings(experiment: Experiment, params: Params) -> Train:
    """The project's section `train` with the experiment's overrides.

    With a synthetic task a sequence is one document, and all checkpoints are kept, so that the accuracy of each can be measured.
    """
    if "seed" in (experiment.train or {}):
        raise ParamsError("train.seed: set an experiment's seeds in `seeds`")
    found = read(Train, {**plain(params.train), **(experiment.train or {})}, "train")
    if experiment.probe is None:
        return found
    return replace(found, context_length=probes.context_length(experiment.probe), keep_every=found.checkpoint_every)


def changed(baseline: Model, change: Mapping[str, Any], where: str) -> Model:
    """The baseline with new values at dotted keys. Raises `ParamsError` for an unknown key."""
    tree = plain(baseline)
    keys = flatten(tree)
    for key, value in change.items():
        if not any(one == key or one.startswith(f"{key}.") for one in keys):
            raise ParamsError(f"{where}: no key {key!r} in the baseline; its keys are {listed(keys)}")
        assign(tree, key.split("."), value, where)
    return read(Model, tree, where)


def _check_declared(name: str, candidate: Candidate, differences: Mapping[str, Any]) -> None:
    """Raise `ParamsError` for an undeclared difference. Learning rates are tuned and d_ff is fitted: neither must be declared."""
    declared = [*(candidate.change or candidate.differs), "optimizer.peak_lr"]
    for key in differences:
        if not key.endswith(".d_ff") and not any(key == one or key.startswith(f"{one}.") for one in declared):
            baseline, ours = differences[key]
            raise ParamsError(
                f"candidates.{name}: differs from the baseline in {key} ({ours!r} instead of {baseline!r}), which is not declared; "
                "give both the same value, or name the key in `differs`"
            )


def stated(value: Any) -> Any:
    """`plain` without fields at their defaults, but with every `kind`, as the first key."""
    if isinstance(value, Mapping):
        return {name: stated(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [stated(item) for item in value]
    if not is_dataclass(value):
        return value
    kept = {"kind": kind} if (kind := getattr(value, "kind", None)) else {}
    for field in fields(value):
        if (own := getattr(value, field.name)) != default_of(field):
            kept[key_of(field.name)] = stated(own)
    return kept
