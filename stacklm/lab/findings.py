"""All results of an experiment, by size, from its records: the source of the report and of all other output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import Any

import numpy as np

from stacklm.config.model import Stacked
from stacklm.lab.experiment import Arm
from stacklm.lab.scaling import FEWEST, DepthFit, Scaling, fit_depth, fit_scaling
from stacklm.lab.schedule import Lab, Records, Result, Tuning
from stacklm.lab.speed import Latency
from stacklm.lab.statistics import bootstrap_interval
from stacklm.lab.trial import read_groups


@dataclass(frozen=True)
class Findings:
    """An experiment with its records so far."""

    name: str
    lab: Lab
    records: Records
    latency: Latency | None = None
    """None if it was not measured."""

    @cached_property
    def results(self) -> dict[float, Result]:
        """The results of the sizes judged so far."""
        found = {size: self.lab.result(self.records, size) for size in self.lab.sizes}
        return {size: result for size, result in found.items() if result}

    @cached_property
    def tunings(self) -> dict[float, Tuning]:
        return {size: self.lab.tuning(self.records, size) for size in self.lab.sizes}

    @property
    def candidates(self) -> list[str]:
        return list(self.lab.experiment.candidates)

    @property
    def names(self) -> list[str]:
        """The names of the baseline and the candidates."""
        return ["baseline", *self.candidates]

    @cached_property
    def final(self) -> Result | None:
        """The result at the largest size judged, if any."""
        return self.results[max(self.results)] if self.results else None

    def arm(self, name: str, size: float) -> Arm:
        return next(arm for arm in self.lab.arms if (arm.name, arm.size) == (name, size))

    def judged(self, name: str, size: float) -> list[Mapping[str, Any]]:
        """The records behind the result of one arm, in the order of the seeds."""
        result, arm = self.results[size], self.arm(name, size)
        return [self.records[self.lab.trial(arm, result.rates[name], seed).identity] for seed in result.seeds]

    def seconds(self, name: str, size: float) -> float:
        """Mean seconds per training run."""
        return fmean(record["seconds"] for record in self.judged(name, size))

    def over_documents(self, name: str, size: float) -> tuple[float, float] | None:
        """The interval of a candidate's difference over seeds and documents; None if a record has no scores per document."""
        pairs = [self.judged(arm, size) for arm in (name, "baseline")]
        if not all("groups" in record for records in pairs for record in records):
            return None
        ours, theirs = ([read_groups(record) for record in records] for records in pairs)
        nats = (np.stack([scores.nats_D for scores in arm]) for arm in (ours, theirs))
        return bootstrap_interval(next(nats), next(nats), ours[0].bytes_D, self.results[size].verdicts[name].level)

    @cached_property
    def scaling(self) -> Scaling | None:
        """Loss as a power law of parameters, from five or more sizes with at least three common seeds; else None."""
        seeds = sorted(set.intersection(*({*result.seeds} for result in self.results.values()))) if self.results else []
        if len(self.results) < FEWEST or len(seeds) < 3:
            return None
        sizes = {name: [self.arm(name, size).cost.parameters for size in self.results] for name in self.names}
        scores = {
            name: np.array([[result.scores[name][result.seeds.index(seed)] for seed in seeds] for result in self.results.values()])
            for name in self.names
        }
        return fit_scaling(sizes, scores)

    @cached_property
    def depth_fit(self) -> DepthFit | None:
        """Loss over stacks and parallel layers at the largest size judged, from arms with equal numbers of layers in all stacks."""
        if self.final is None or self.lab.experiment.probe:
            return None
        shapes = {name: self._shape(name, self.final.size) for name in self.names}
        stacked = {name: shape for name, shape in shapes.items() if shape}
        return fit_depth([*stacked.values()], [self.final.scores[name] for name in stacked])

    def _shape(self, name: str, size: float) -> tuple[int, int] | None:
        arm = self.arm(name, size)
        if not isinstance(arm.model.architecture, Stacked):
            return None
        stacks = arm.model.architecture.stacks_for(arm.train.context_length)
        layers = {stack.layers for stack in stacks}
        return (len(stacks), layers.pop()) if len(layers) == 1 else None
