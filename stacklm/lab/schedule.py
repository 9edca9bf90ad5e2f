"""The pending trials and the results of an experiment: a pure function of its file and the records of its trials.

First the learning rate of every arm at every size is bracketed on the tuning seeds and the valid set; then every arm is
trained with its best rate on the judging seeds, and the test set decides. Nothing here trains: the caller runs trials and calls
`pending` again after each, so that any number of workers, and any interruption, lead to the same verdict.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from stacklm.config.train import Train
from stacklm.lab.experiment import Arm, Experiment
from stacklm.lab.statistics import (
    ALPHA,
    AgainstItself,
    Verdict,
    against_itself,
    judge,
    relative_differences,
    sequential_verdict,
    smallest_detectable,
    verdicts,
)
from stacklm.lab.trial import Trial
from stacklm.lab.tuning import best_rate, first_rates, next_rates

Records = Mapping[str, Mapping[str, Any]]
"""Records by identity of the trial; `{"failed": why}` for one that diverged or failed permanently."""
ROUNDING = 1e-6
"""Learning rates with a smaller relative difference are equal. The flatter the parabola, the more rounding moves its minimum."""


@dataclass(frozen=True)
class Planned:
    """A trial with its arm and purpose."""

    trial: Trial
    arm: Arm
    purpose: Literal["tune", "judge"]

    @property
    def name(self) -> str:
        """The name in messages, such as `stacked size 2, lr 0.004, seed 101`."""
        rate = self.trial.model.optimizer.peak_lr
        return f"{self.arm.name} size {self.arm.size:g}, lr {rate:.3g}, seed {self.trial.train.seed}"


@dataclass(frozen=True)
class Tuning:
    """The learning rates of every arm of one size, and the valid scores of those whose trials are complete."""

    rates: dict[str, list[float]]
    scores: dict[str, dict[float, list[float]]]

    @property
    def complete(self) -> bool:
        """Whether every rate has scores."""
        return all(len(self.scores[name]) == len(rates) for name, rates in self.rates.items())


@dataclass(frozen=True)
class Lab:
    """An experiment with its arms and the identities of its data and code."""

    experiment: Experiment
    arms: Sequence[Arm]
    settings: Train
    """The section `train` of the baseline's trials, except the seed."""
    data: str
    code: str
    pause: int | None = None
    """Maximum number of judging seeds for now: at each look the user decides whether to continue."""
    own: Mapping[str, str] = field(default_factory=dict)
    """Identity of a model's code by name of the arm, for models from outside this package."""
    _trials: dict[tuple[str, float, float, int], Trial] = field(default_factory=dict, repr=False, compare=False)

    @property
    def sizes(self) -> list[float]:
        return sorted({arm.size for arm in self.arms})

    def arms_of(self, size: float) -> list[Arm]:
        return [arm for arm in self.arms if arm.size == size]

    def trial(self, arm: Arm, rate: float, seed: int) -> Trial:
        """The trial of one arm with that learning rate and seed."""
        key = arm.name, arm.size, rate, seed
        if key not in self._trials:
            model = replace(arm.model, optimizer=replace(arm.model.optimizer, peak_lr=rate))
            self._trials[key] = Trial(model, replace(arm.train, seed=seed), self.data, self.code, self.own.get(arm.name, ""))
        return self._trials[key]

    def tuning(self, records: Records, size: float) -> Tuning:
        """The learning rates that every arm of a size needs so far, and the scores of those whose trials are complete."""
        arms = self.arms_of(size)
        if not self.experiment.seeds.tune:  # the baseline alone, with its own learning rate
            own = {arm.name: arm.model.optimizer.peak_lr for arm in arms}
            return Tuning({name: [rate] for name, rate in own.items()}, {name: {rate: [0.0]} for name, rate in own.items()})
        rates = {arm.name: first_rates(arm.model.optimizer.peak_lr, self.experiment.rates) for arm in arms}
        while True:
            found = Tuning(rates, {arm.name: self._scored(records, arm, rates[arm.name]) for arm in arms})
            further = next_rates(found.scores) if found.complete else {}
            if not further:
                return found
            for name, rate in further.items():
                rates[name].append(rate)

    def _scored(self, records: Records, arm: Arm, rates: Sequence[float]) -> dict[float, list[float]]:
        found = {}
        for rate in rates:
            trials = [self.trial(arm, rate, seed).identity for seed in self.experiment.seeds.tune]
            if all(identity in records for identity in trials):
                found[rate] = [score(records[identity], "valid") for identity in trials]
        return found

    def best(self, records: Records, size: float) -> dict[str, float]:
        """The best rate of every arm of a size; empty while trials are missing. Raises `ValueError` if every rate diverged.

        On another processor the last digits of the fitted rate differ, so a recorded rate within `ROUNDING` is used instead.
        """
        tuning, arms = self.tuning(records, size), self.arms_of(size)
        if not tuning.complete:
            return {}
        recorded = {record["model"]["optimizer"]["peak_lr"] for record in records.values() if "model" in record}
        return {arm.name: self._as_recorded(records, arm, best_rate(tuning.scores[arm.name]), recorded) for arm in arms}

    def _as_recorded(self, records: Records, arm: Arm, fitted: float, recorded: Iterable[float]) -> float:
        close = [rate for rate in recorded if math.isclose(rate, fitted, rel_tol=ROUNDING)]
        close.sort(key=lambda rate: abs(rate - fitted))
        seeds = self.experiment.seeds.judge
        return next((rate for rate in close if any(self.trial(arm, rate, seed).identity in records for seed in seeds)), fitted)

    def trials(self, records: Records) -> list[Planned]:
        """All trials known to be needed, done or not: small sizes first, tuning before judging, seed by seed over all arms, so that
        pairs are complete early."""
        found = []
        for size in self.sizes:
            arms = {arm.name: arm for arm in self.arms_of(size)}
            tuning = self.tuning(records, size)
            tuned = [(arms[name], rate) for name, rates in tuning.rates.items() for rate in rates]
            judged = [(arms[name], rate) for name, rate in self.best(records, size).items()]
            for seed in self.experiment.seeds.tune:
                found += [Planned(self.trial(arm, rate, seed), arm, "tune") for arm, rate in tuned]
            for seed in self._judging(records, size) if judged else ():
                found += [Planned(self.trial(arm, rate, seed), arm, "judge") for arm, rate in judged]
        return found

    def _judging(self, records: Records, size: float) -> Sequence[int]:
        """The judging seeds needed so far: all, or those up to the first look that is incomplete or decides."""
        seeds = self.experiment.seeds
        for look in seeds.looks[:-1]:
            done = len(self._scores(records, size, seeds.judge[:look]))
            result = self.result(records, size, seeds.judge[:look])
            if done < look or (result and all(verdict.outcome != "no verdict" for verdict in result.verdicts.values())):
                return seeds.judge[:look][: self.pause]
        return seeds.judge[: self.pause]

    def judged(self, records: Records, size: float) -> int:
        """The number of judging seeds with which all arms of a size are done."""
        return len(self._scores(records, size, self.experiment.seeds.judge))

    def done(self, records: Records) -> list[Planned]:
        """The trials that have a record."""
        return [planned for planned in self.trials(records) if planned.trial.identity in records]

    def pending(self, records: Records) -> list[Planned]:
        """The trials that can run now, in order; empty if none is left."""
        return [planned for planned in self.trials(records) if planned.trial.identity not in records]

    def flops_to_come(self, records: Records) -> float:
        """Training FLOPs of all remaining trials, including the judging that follows unfinished tuning."""
        judged = [arm for size in self.sizes if not self.tuning(records, size).complete for arm in self.arms_of(size)]
        later = sum(arm.cost.training_flops for arm in judged) * len(self.experiment.seeds.judge)
        return later + sum(planned.arm.cost.training_flops for planned in self.pending(records))

    def _scores(self, records: Records, size: float, seeds: Sequence[int]) -> dict[int, dict[str, float]]:
        """Test scores of all arms of a size with each seed that is complete; empty before learning rates are chosen."""
        chosen = self.best(records, size)
        if not chosen:
            return {}
        scores = {}
        for seed in seeds:
            identities = {arm.name: self.trial(arm, chosen[arm.name], seed).identity for arm in self.arms_of(size)}
            if all(identity in records for identity in identities.values()):
                scores[seed] = {name: score(records[identity], "test") for name, identity in identities.items()}
        return scores

    def result(self, records: Records, size: float, seeds: Sequence[int] | None = None) -> Result | None:
        """The result at one size from the judging seeds, or from `seeds`; None while fewer than 3 are complete for all arms.

        A seed with which any arm failed is excluded for all arms and listed in `left_out`.
        """
        scores = self._scores(records, size, self.experiment.seeds.judge if seeds is None else seeds)
        arms, chosen = [arm.name for arm in self.arms_of(size)], self.best(records, size)
        whole = {seed: row for seed, row in scores.items() if all(map(math.isfinite, row.values()))}
        if len(whole) < 3:
            return None
        baseline = [row["baseline"] for row in whole.values()]
        differences = {
            name: relative_differences([row[name] for row in whole.values()], baseline) for name in arms if name != "baseline"
        }
        return Result(
            size=size,
            rates=chosen,
            seeds=tuple(whole),
            left_out=tuple(seed for seed in scores if seed not in whole),
            scores={name: tuple(row[name] for row in whole.values()) for name in arms},
            verdicts=self._verdicts(differences),
        )

    def _verdicts(self, differences: Mapping[str, NDArray[np.float64]]) -> dict[str, Verdict]:
        """The verdicts on all candidates: by Holm's method, or at the planned looks with alpha divided equally among candidates."""
        experiment, alpha = self.experiment, ALPHA / max(1, len(differences))
        if not experiment.seeds.looks:
            return verdicts(differences, experiment.margin)
        enough = min((values.size for values in differences.values()), default=0) >= experiment.seeds.looks[0]
        if not enough:  # fewer seeds than the first look needs, for instance because some failed
            return {name: replace(judge(values, experiment.margin), outcome="no verdict") for name, values in differences.items()}
        return {
            name: sequential_verdict(values, experiment.seeds.looks, experiment.margin, alpha)
            for name, values in differences.items()
        }


@dataclass(frozen=True)
class Result:
    """Test scores of all arms at one size on the same seeds, and a verdict on each candidate."""

    size: float
    rates: Mapping[str, float]
    seeds: tuple[int, ...]
    left_out: tuple[int, ...]
    """Seeds with which an arm failed."""
    scores: Mapping[str, tuple[float, ...]]
    verdicts: Mapping[str, Verdict]

    @property
    def sigma(self) -> float:
        """Relative standard deviation of the baseline over seeds."""
        values = np.asarray(self.scores["baseline"])
        return float(values.std(ddof=1) / values.mean())

    def pairing(self, name: str) -> float:
        """The sd of a candidate's paired differences over that of unpaired ones, by the baseline's sigma; below 1 pairing helps."""
        return self.verdicts[name].sd / (math.sqrt(2) * self.sigma)

    @property
    def against_itself(self) -> AgainstItself | None:
        """The A/A test of the baseline; None for fewer than 4 seeds."""
        scores = self.scores["baseline"]
        return against_itself(scores) if len(scores) >= 4 else None

    @property
    def detectable(self) -> float:
        """The smallest relative difference that these seeds detect with 80% power, if pairing has no effect."""
        return smallest_detectable(len(self.seeds), math.sqrt(2) * self.sigma)


def score(record: Mapping[str, Any], split: str) -> float:
    """Bits per byte of a record; infinite for a trial that diverged or failed."""
    return math.inf if "failed" in record else record[split]["bits_per_byte"]
