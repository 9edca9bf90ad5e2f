"""Where a gate stands: what each of its looks takes and can see, the interval as it narrows, and the verdict in one sentence."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from stacklm.console import table
from stacklm.lab.experiment import Arm
from stacklm.lab.gate import EXIT_CODES
from stacklm.lab.schedule import Lab, Planned, Records, Result
from stacklm.lab.statistics import Verdict, judge, relative_differences, sequential_level, smallest_detectable
from stacklm.lab.text import measured_sigma, sentence, shown
from stacklm.units import duration, interval

OVERHEAD = 2.0
"""Seconds of a trial beside training and scoring."""
BAR = 41
"""Characters of a drawn interval."""


@dataclass(frozen=True)
class Pace:
    """Seconds of a whole trial of each arm, by `Arm.key`, and how many trials run at once."""

    trial: Mapping[str, float]
    at_once: int

    def __call__(self, arms: list[Arm]) -> float:
        """Seconds for a trial of each of these."""
        return sum(self.trial[arm.key] for arm in arms) / self.at_once

    def corrected(self, arms: list[Arm], seconds: float) -> Pace:
        """After trials of these have taken so long in all."""
        factor = seconds / self(arms) if arms else 1.0
        return replace(self, trial={key: factor * expected for key, expected in self.trial.items()})


def pace(lab: Lab, speeds: Mapping[str, float], scored: int, at_once: int) -> Pace:
    """From measured seconds per step, by `Arm.key`, and the tokens that a trial scores at its end.

    Scoring a token takes a third of training on it.
    """

    def seconds(arm: Arm) -> float:
        train = arm.train
        validated = train.eval_tokens * (train.last_step // train.eval_every)
        steps = train.last_step + (scored + validated) / train.tokens_per_step / 3
        return OVERHEAD + speeds[arm.key] * steps

    return Pace({arm.key: seconds(arm) for arm in lab.arms}, at_once)


@dataclass(frozen=True)
class Gate:
    """An experiment of one candidate, one size and declared looks, with the records so far."""

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
        """How many looks are complete."""
        seeds = self.lab.judged(self.records, 1.0)
        return sum(look <= seeds for look in self.looks)

    @property
    def result(self) -> Result | None:
        return self.lab.result(self.records, 1.0)

    @property
    def verdict(self) -> Verdict | None:
        """At the first look that decides, or else at the last complete one; None before any, and where too many seeds failed."""
        return self.result.verdicts[self.candidate] if self.result and self.look else None

    @property
    def outcome(self) -> str:
        return self.verdict.outcome if self.verdict else "no verdict"

    @property
    def next_look(self) -> int | None:
        """The seeds of the look that is due, None after a verdict or the last one."""
        decided = self.outcome != "no verdict"
        return None if decided or self.look == len(self.looks) else self.looks[self.look]

    def trainings(self, number: int) -> list[Arm]:
        """What is still to be trained for a look beyond the one before, an arm for each trial, as far as is known."""
        done, tuning = self.lab.judged(self.records, 1.0), []
        if number == 0:
            tuning = [planned.arm for planned in self.lab.pending(self.records) if planned.purpose == "tune"]
        seeds = self.looks[number] - max(done, self.looks[number - 1] if number else 0)
        return tuning + list(self.lab.arms) * max(0, seeds)

    def table(self) -> str:
        """Of every look: seeds, trainings, time, and the smallest difference that it sees."""
        level, (sigma, source) = sequential_level(self.looks), measured_sigma(self.lab, self.records)
        rows = []
        for number, seeds in enumerate(self.looks):
            arms = self.trainings(number)
            seen = smallest_detectable(seeds, math.sqrt(2) * sigma, level)
            rows.append((f"{number + 1}", f"{seeds}", f"{len(arms)}", duration(self.pace(arms)) if arms else "done", f"{seen:.1%}"))
        return "\n".join(
            [
                table(("look", "seeds", "trainings", "time", "sees"), rows, left=0),
                f"{self.pace.at_once} trainings at once; `sees`: the smallest difference found with 80% power ({source})",
                f"at each look the interval is of {1 - 2 * level:.1%}, which over all of them errs in 5% of the cases",
            ]
        )

    def line(self, planned: Planned, left: int) -> str:
        """About a trial that has ended; from three seeds on with the interval so far."""
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
        """What was found, and what would decide where nothing has."""
        if self.verdict is None:
            return f"{self.candidate}: no verdict; fewer than {self.looks[0]} seeds are complete for both models"
        text = sentence(self.candidate, self.verdict, self.pace(list(self.lab.arms)))
        if self.outcome == "no verdict" and self.next_look is None:
            text += f"; all {self.looks[-1]} seeds that were declared are used, --again judges on fresh ones"
        return text

    def plain(self) -> dict[str, Any]:
        """For scripts."""
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
    """An interval as characters, from `-reach` to `reach`: `o` its mean, `|` zero, `<` and `>` ends that lie beyond."""

    def place(value: float) -> int:
        return round((max(-1.0, min(1.0, value / reach)) + 1) / 2 * (BAR - 1))

    low, mean, high = (place(value) for value in (found.low, found.mean, found.high))
    cells = ["-" if low <= i <= high else " " for i in range(BAR)]
    cells[low], cells[high] = "<" if found.low < -reach else "(", ">" if found.high > reach else ")"
    cells[BAR // 2] = "|"
    cells[mean] = "o"
    return f"[{''.join(cells)}]"
