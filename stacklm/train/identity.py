"""What makes a run the one it is, and which differences between two runs matter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stacklm.config.schema import ParamsError, read
from stacklm.config.train import Train
from stacklm.train.schedule import lr_factor

CURVE = ("steps", "warmup_steps", "schedule", "decay", "final_lr")
"""What fixes the learning rates: compared by the rates that it led to."""
ROUNDING = ("micro_batch", "recompute", "layers_at_once", "compile", "threads", "device", "processes", "parallel")
"""What changes results by rounding."""
UPKEEP = ("stop_step", "checkpoint_every", "keep_checkpoints", "milestone_every", "resume")
"""What changes no result."""
ROWS = ("valid_every", "valid_tokens")
"""What changes no weights, but the rows of the metrics."""

Differences = dict[str, tuple[Any, Any]]


def decisive(then: Mapping[str, Any], now: Mapping[str, Any], step: int) -> Differences:
    """What sets two identities apart after `step` steps by more than rounding: dotted keys with both values."""
    ignored = {f"train.{key}" for key in (*ROUNDING, *UPKEEP, *ROWS)}
    if _same_rates(then.get("train"), now.get("train"), step):
        ignored |= {f"train.{key}" for key in CURVE}
    return {key: values for key, values in differing(then, now).items() if key not in ignored}


def rounding(then: Mapping[str, Any], now: Mapping[str, Any]) -> Differences:
    """What sets two identities apart by rounding."""
    return {key: values for key, values in differing(then, now).items() if key.removeprefix("train.") in ROUNDING}


def differing(then: Mapping[str, Any], now: Mapping[str, Any]) -> Differences:
    """All that sets two nested mappings apart."""
    before, after = _flat(then), _flat(now)
    return {key: (before.get(key), after.get(key)) for key in {**before, **after} if before.get(key) != after.get(key)}


def _same_rates(then: Any, now: Any, step: int) -> bool:
    try:
        before, after = read(Train, then), read(Train, now)
    except ParamsError:
        return False
    return all(lr_factor(i, before) == lr_factor(i, after) for i in range(1, step + 1))


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one of dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
