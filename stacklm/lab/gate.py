"""A significance gate: one model against a baseline, as an experiment whose looks are declared before the first trial."""

from __future__ import annotations

import dataclasses
import io
from bisect import bisect_left
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from ruamel.yaml import YAML

from stacklm.config.model import Dense, Model
from stacklm.config.params import Params
from stacklm.config.schema import ParamsError, differing_fields, listed, plain, read
from stacklm.config.train import Train
from stacklm.lab.budget import Axis, cost, fitted, mismatch
from stacklm.lab.candidate import Named
from stacklm.lab.experiment import Candidate, Experiment, Seeds, settings

LOOKS = (3, 5, 8, 12)
TUNE = (101,)
MOST_HEADS = 1024
EXIT_CODES = {"better": 0, "not worse": 3, "worse": 4, "no verdict": 5}
"""Of the command, for scripts; errors have 2."""


@dataclass(frozen=True)
class Terms:
    """What a gate holds equal, how often and how long it may look; `train` as in an experiment."""

    budget: Axis = "parameters"
    margin: float = 0.005
    rates: int = 5
    looks: tuple[int, ...] = LOOKS
    train: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if not self.looks or self.looks[0] < 3 or any(b <= a for a, b in pairwise(self.looks)):
            raise ParamsError(f"--looks {listed(self.looks)}: write growing numbers of seeds, from 3 on")


def of_steps(steps: int, train: Train) -> dict[str, Any]:
    """Settings of a training of that many steps, with no longer a warm-up than a tenth of it."""
    return {"max_steps": steps, "hard_stop": None, "warmup_steps": min(train.warmup_steps, steps // 10)}


def gate(candidate: Named, baseline: Named, params: Params, terms: Terms, first_seed: int = 1) -> Experiment:
    """The experiment that settles whether the candidate beats the baseline, which is brought to the candidate's budget.

    The candidate stays exactly as it is. Raises `ParamsError` where it is the baseline, which else must meet its budget.
    """
    if candidate.model == baseline.model:
        raise ParamsError(f"{baseline.name} is the baseline itself; name another one by --baseline, or change a setting by --set")
    ours, theirs = (plain(one.model) for one in (candidate, baseline))
    differs = {key.partition(".")[0] for key in differing_fields(ours, theirs) if key != "optimizer.peak_lr"}
    equal = terms.budget.replace("_", " ")
    experiment = Experiment(
        question=f"Does {candidate.name} need fewer bits per byte than {baseline.name} at equal {equal}?",
        refuted_by="the interval of the difference lies above zero",
        budget=terms.budget,
        margin=terms.margin,
        baseline=baseline.model,
        candidates={candidate.name: Candidate(model=candidate.model, differs=tuple(sorted(differs)), fit=False)},
        seeds=Seeds(TUNE, tuple(range(first_seed, first_seed + terms.looks[-1])), terms.looks),
        rates=terms.rates,
        train=terms.train,
    )
    train, vocab_size = settings(experiment, params), params.tokenizer.vocab_size
    found = replace(experiment, baseline=matched(baseline.model, candidate.model, train, vocab_size, terms.budget))
    return read(Experiment, plain(found))  # with all checks of a file's


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
    kept = {key: getattr(value, key) for key in ("kind",) if hasattr(value, key)}
    for field, key in zip(dataclasses.fields(value), plain(value), strict=True):
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if getattr(value, field.name) != default:
            kept[key] = stated(getattr(value, field.name))
    return kept
