"""The sentences that the page and the Markdown share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stacklm.report.comparison import MATCHED, SMALLEST_DIFFERENCE, unmatched
from stacklm.report.units import percent

CURVES = (
    "Thick with markers: loss on the validation sample. Thin: training loss, averaged over "
    "neighbouring steps. Lower is better. The horizontal axes are logarithmic and begin shortly before the first validation."
)
HEALTH = (
    "What one optimizer step changed as a share of the weights, by what parameters are for, and the scale of activations behind "
    "each stack or block (of many, some are shown). Parts that lie far apart, or keep rising, deserve a look: docs/training.md."
)
TIMING = (
    "Times and memory depend on the machine and on what else it did, such as training another model beside; they are no "
    "part of the comparison's deterministic record (comparison.json)."
)


def title(comparison: Mapping[str, Any]) -> str:
    names = list(comparison["models"])
    return f"{', '.join(names[:-1])} and {names[-1]}, side by side" if len(names) > 1 else f"{names[0]}, on its own"


def caveats(comparison: Mapping[str, Any]) -> list[str]:
    """What a reader must know before believing a difference."""
    seed = comparison["provenance"]["seed"]
    notes = [
        f"Every model was trained once, with seed {seed}: no interval can be given, so there is no verdict.",
        f"Models closer than {SMALLEST_DIFFERENCE} nats per token are not told apart; other seeds may move them further than that.",
        "The comparison is as fair as the tuning: each model's learning rate must have been swept with the same effort.",
    ]
    return notes + [_match(comparison["baseline"], name, shares) for name, shares in comparison["mismatch"].items()]


def _match(baseline: str, name: str, mismatch: Mapping[str, float]) -> str:
    off = unmatched(mismatch)
    if not off:
        return f"{name} is matched to {baseline} within {MATCHED:.0%} in parameters, compute and tokens."
    return f"{name} is not matched to {baseline} in {', '.join(f'{axis} ({percent(share)})' for axis, share in off.items())}."
