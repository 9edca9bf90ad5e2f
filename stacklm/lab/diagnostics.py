"""What an experiment on a synthetic task has found, as text: accuracy and the steps to learn it. No verdict rests on these."""

from __future__ import annotations

import statistics

import numpy as np

from stacklm.console import table
from stacklm.lab.answers import LEARNT
from stacklm.lab.probes import Probe
from stacklm.lab.schedule import Lab, Records, Result
from stacklm.lab.statistics import ALPHA, interval


def diagnostics(lab: Lab, probe: Probe, records: Records, result: Result) -> str:
    """A row for each arm: test accuracy with its interval over seeds, and the median step at which it had learnt the task."""
    arms = {arm.name: arm for arm in lab.arms if arm.size == result.size}
    rows = []
    for name, rate in result.rates.items():
        found = [records[lab.trial(arms[name], rate, seed).identity] for seed in result.seeds]
        accuracies = [record["test"]["accuracy"] for record in found]
        low, high = np.clip(interval(accuracies), 0, 1)
        learnt = sorted(record["learnt_at"] for record in found if record["learnt_at"] is not None)
        steps = f"{statistics.median_low(learnt):,} ({len(learnt)} of {len(found)} seeds)" if learnt else "never"
        rows.append((name, f"{rate:.2e}", f"{statistics.mean(accuracies):.1%}", f"{low:.1%} to {high:.1%}", steps))
    columns = ("arm", "learning rate", "test accuracy", "interval", f"steps to {LEARNT:.0%}")
    about = f"size {result.size:g}: {len(result.seeds)} seeds, intervals of {1 - 2 * ALPHA:.0%}, chance {probe.chance:.1%}"
    return f"{about}\n{table(columns, rows)}"
