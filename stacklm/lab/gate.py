"""The significance gate of `stacklm try`: an experiment that compares one model with a baseline at looks declared beforehand; and
its state: cost and detectable difference of each look, the interval so far, and the verdict in one sentence."""

from __future__ import annotations

import io
import math
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
from stacklm.config.schema import ParamsError, differing_fields, listed, nearest, plain, read
from stacklm.config.train import Train
from stacklm.console import table
from stacklm.lab.budget import Axis, cost, fitted, mismatch
from stacklm.lab.experiment import Arm, Candidate, Experiment, Seeds, settings, stated
from stacklm.lab.schedule import Lab, Planned, Records, Result
from stacklm.lab.statistics import Verdict, judge, relative_differences, sequential_level, smallest_detectable
from stacklm.lab.text import measured_sigma, sentence, shown
from stacklm.model.custom import model_named
from stacklm.units import duration, interval

SECTIONS = ("architecture", "optimizer", "settings", "train")
TUNE = (101,)
"""Seeds for tuning learning rates; the judging seeds count from 1."""
MOST_HEADS = 1024
EXIT_CODES = {"better": 0, "not worse": 3, "worse": 4, "no verdict": 5}
"""Exit codes of the command by verdict; 2 is for errors."""
OVERHEAD = 2.0
"""Seconds per trial in addition to training and scoring."""
BAR = 41
"""Width of a drawn interval in characters."""


@dataclass(frozen=True)
class Named:
    """A model with its name in messages and files."""

    name: str
    model: Model

    def __post_init__(self) -> None:
        if not re.fullmatch(NAME_PATTERN, self.name) or self.name == "baseline":
            raise ParamsError(
                f"{self.name!r} cannot be the name of a model: a name starts with a letter, contains only letters, "
                "digits, `_` and `-`, and is not `baseline`"
            )


def find_baseline(name: str | None, params: Params) -> Named:
    """The model of that name, by default the first dense one. Raises `ParamsError` listing the models if there is none."""
    if name is not None and name not in params.models:
        raise ParamsError(f"--baseline {name}: no such model; the models are {listed(params.models)}{nearest(name, params.models)}")
    dense = (key for key, model in params.models.items() if isinstance(model.architecture, Dense))
    chosen = name or next(dense, None)
    if chosen is None:
        raise ParamsError(f"no dense model in params.yaml to compare with; choose one with --baseline: {listed(params.models)}")
    return Named(chosen, params.models[chosen])


def find_candidate(target: str, params: Params, optimizer: Optimizer) -> Named:
    """The candidate: a model of params.yaml by name, the model in a YAML file, or a class in a Python file, `my_model.py:Mine`.

    A model from a file gets `optimizer`, unless a YAML file sets its own. Raises `ParamsError` for an unknown name, listing the
    models, and for a Python file with several models if none is named.
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
        raise ParamsError(f"no model {target!r} in params.yaml, and not a .py or .yaml file; {known}")
    return Named(target, params.models[target])


def changed(named: Named, assignments: Iterable[str]) -> tuple[Named, dict[str, Any]]:
    """The model with `KEY=VALUE` assignments applied, and the values for `train`; `settings.x` is short for
    `architecture.settings.x`.

    Raises `ParamsError` for an unknown key and for an invalid value.
    """
    tree = {**plain(named.model), "train": {}}
    for assignment in assignments:
        first, *rest = assignment.partition("=")[0].split(".")
        if not ("=" in assignment and all(rest) and rest and first in SECTIONS):
            raise ParamsError(f"--set {assignment}: write KEY=VALUE, where KEY starts with one of {listed(SECTIONS)} and a dot")
        _, value = read_value(assignment)
        assign(tree, ["architecture"] * (first == "settings") + [first, *rest], value, f"--set {assignment}")
    train = tree.pop("train")
    return Named(named.name, read(Model, tree, named.name)), train


def of_steps(steps: int, train: Train) -> dict[str, Any]:
    """Settings for a run of `steps` steps, with a warm-up of at most a tenth of them."""
    return {"max_steps": steps, "hard_stop": None, "warmup_steps": min(train.warmup_steps, steps // 10)}


def gate_experiment(
    candidate: Named,
    baseline: Named,
    params: Params,
    budget: Axis,
    margin: float,
    rates: int,
    looks: tuple[int, ...],
    train: dict[str, Any] | None,
) -> Experiment:
    """The experiment that tests whether the candidate beats the baseline, which is resized to the candidate's budget.

    The candidate is not changed. Raises `ParamsError` if it is the baseline itself, or if the baseline cannot meet its budget.
    """
    if candidate.model == baseline.model:
        raise ParamsError(f"{baseline.name} is the baseline itself; choose another with --baseline, or change a setting with --set")
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
    return read(Experiment, plain(replace(experiment, baseline=matching)))  # runs all checks of an experiment's file


def matched(baseline: Model, candidate: Model, train: Train, vocab_size: int, axis: Axis) -> Model:
    """The baseline at the candidate's size: a dense one gets the nearest width in whole heads, then its d_ff is fitted.

    On the axes `tokens` and `seconds` it is not changed. Raises `ParamsError` if it cannot meet the budget.
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
    """The model with `heads` heads of the same dim, and all widths in proportion."""
    d_model, d_ff = dense.d_model // dense.n_heads * heads, max(1, round(dense.d_ff * heads / dense.n_heads))
    return replace(model, architecture=replace(dense, d_model=d_model, n_heads=heads, d_ff=d_ff))


def written(experiment: Experiment, head: str) -> str:
    """The text of the experiment's file: `head` as a comment, then all values that are not defaults."""
    yaml, buffer = YAML(), io.StringIO()
    yaml.default_flow_style, yaml.width = None, 120
    yaml.dump(stated(experiment), buffer)
    return f"# {head}\n{buffer.getvalue()}"


@dataclass(frozen=True)
class Pace:
    """Seconds per trial of each arm, by `Arm.key`, and how many trials run in parallel."""

    trial: Mapping[str, float]
    at_once: int

    def __call__(self, arms: list[Arm]) -> float:
        """Seconds for one trial of each of these arms."""
        return sum(self.trial[arm.key] for arm in arms) / self.at_once

    def corrected(self, arms: list[Arm], seconds: float) -> Pace:
        """The pace after trials of these arms took `seconds` in total."""
        factor = seconds / self(arms) if arms else 1.0
        return replace(self, trial={key: factor * expected for key, expected in self.trial.items()})


def pace(lab: Lab, speeds: Mapping[str, float], scored: int, at_once: int) -> Pace:
    """The pace from measured seconds per step, by `Arm.key`, and the number of tokens that a trial scores at its end.

    Scoring a token is taken to cost a third of training on it.
    """

    def seconds(arm: Arm) -> float:
        train = arm.train
        validated = train.eval_tokens * (train.last_step // train.eval_every)
        steps = train.last_step + (scored + validated) / train.tokens_per_step / 3
        return OVERHEAD + speeds[arm.key] * steps

    return Pace({arm.key: seconds(arm) for arm in lab.arms}, at_once)


@dataclass(frozen=True)
class Gate:
    """An experiment with one candidate, one size and declared looks, and its records so far."""

    lab: Lab
    records: Records
    pace: Pace

    @property
    def candidate(self) -> str:
        return next(iter(self.lab.experiment.candidates))

    @property
    def looks(self) -> tuple[int, ...]:
        return self.lab.experiment.seeds.looks

    @property
    def look(self) -> int:
        """The number of complete looks."""
        seeds = self.lab.judged(self.records, 1.0)
        return sum(look <= seeds for look in self.looks)

    @property
    def result(self) -> Result | None:
        return self.lab.result(self.records, 1.0)

    @property
    def verdict(self) -> Verdict | None:
        """The verdict at the first decisive look, else at the last complete one; None without one, or if too many seeds failed."""
        return self.result.verdicts[self.candidate] if self.result and self.look else None

    @property
    def outcome(self) -> str:
        return self.verdict.outcome if self.verdict else "no verdict"

    @property
    def next_look(self) -> int | None:
        """Number of seeds of the next look; None after a verdict or the last look."""
        decided = self.outcome != "no verdict"
        return None if decided or self.look == len(self.looks) else self.looks[self.look]

    def trainings(self, number: int) -> list[Arm]:
        """The trials still needed for a look beyond those of the previous one, as one arm per trial, as far as known."""
        done, tuning = self.lab.judged(self.records, 1.0), []
        if number == 0:
            tuning = [planned.arm for planned in self.lab.pending(self.records) if planned.purpose == "tune"]
        seeds = self.looks[number] - max(done, self.looks[number - 1] if number else 0)
        return tuning + list(self.lab.arms) * max(0, seeds)

    def table(self) -> str:
        """A table of the looks: seeds, training runs, time, and the smallest detectable difference."""
        level, (sigma, source) = sequential_level(self.looks), measured_sigma(self.lab, self.records)
        rows = []
        for number, seeds in enumerate(self.looks):
            arms = self.trainings(number)
            seen = smallest_detectable(seeds, math.sqrt(2) * sigma, level)
            rows.append((f"{number + 1}", f"{seeds}", f"{len(arms)}", duration(self.pace(arms)) if arms else "done", f"{seen:.1%}"))
        return "\n".join(
            [
                table(("look", "seeds", "training runs", "time", "detects"), rows, left=0),
                f"{self.pace.at_once} training runs in parallel; `detects`: the smallest difference seen with 80% power ({source})",
                f"each look uses a {1 - 2 * level:.1%} interval, for an error rate of 5% over all looks",
            ]
        )

    def line(self, planned: Planned, left: int) -> str:
        """One line about a finished trial; from three seeds on also the interval so far."""
        text = shown(planned, self.records[planned.trial.identity], len(self.lab.done(self.records)), left)
        result = self.result
        if planned.purpose == "tune" or result is None:
            return text
        level = sequential_level(self.looks)
        values = relative_differences(result.scores[self.candidate], result.scores["baseline"])
        found, first = (judge(some, self.lab.experiment.margin, level) for some in (values, values[:3]))
        drawn = bar(found, max(-first.low, first.high))
        return f"{text}\n  {len(values):>3} seeds {drawn} {found.mean:+.2%} ({interval(found.low, found.high)})"

    def sentence(self) -> str:
        """The result in one sentence; without a verdict, how many more seeds would decide."""
        if self.verdict is None:
            return f"{self.candidate}: no verdict; fewer than {self.looks[0]} seeds are complete for both models"
        text = sentence(self.candidate, self.verdict, self.pace(list(self.lab.arms)))
        if self.outcome == "no verdict" and self.next_look is None:
            text += f"; all {self.looks[-1]} declared seeds are used, --again judges on fresh ones"
        return text

    def plain(self) -> dict[str, Any]:
        """The result as plain values, for `--json`."""
        verdict, result = self.verdict, self.result
        keys, more = ("mean", "low", "high", "seeds", "level", "more_seeds"), verdict.more_seeds if verdict else None
        return {
            "candidate": self.candidate,
            "verdict": self.outcome,
            "exit_code": EXIT_CODES[self.outcome],
            "sentence": self.sentence(),
            **{key: getattr(verdict, key, None) for key in keys},
            "more_seconds": more and round(more * self.pace(list(self.lab.arms))),
            "margin": self.lab.experiment.margin,
            "look": self.look,
            "looks": self.looks,
            "held_equal": self.lab.experiment.budget,
            "parameters": {arm.name: arm.cost.parameters for arm in self.lab.arms},
            "learning_rates": result and result.rates,
            "test_bits_per_byte": result and result.scores,
        }


def bar(found: Verdict, reach: float) -> str:
    """An interval drawn with characters from `-reach` to `reach`: `o` is the mean, `|` zero, `<` and `>` are ends outside."""

    def place(value: float) -> int:
        return round((max(-1.0, min(1.0, value / reach)) + 1) / 2 * (BAR - 1))

    low, mean, high = (place(value) for value in (found.low, found.mean, found.high))
    cells = ["-" if low <= i <= high else " " for i in range(BAR)]
    cells[low], cells[high] = "<" if found.low < -reach else "(", ">" if found.high > reach else ")"
    cells[BAR // 2] = "|"
    cells[mean] = "o"
    return f"[{''.join(cells)}]"
