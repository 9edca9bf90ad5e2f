"""The learning rate over a run."""

from __future__ import annotations

import math

from stacklm.config.train import Train


def lr_factor(step: int, config: Train) -> float:
    """The share of the peak learning rate for the update that leads to `step`, 1 to `config.steps`.

    It rises linearly and reaches 1 at `warmup_steps`, then falls to `final_lr` at the last step: along half a cosine
    (Loshchilov & Hutter 2016, 1608.03983), along a line, or (`wsd`: Hu et al. 2024, 2404.06395) along a line over the
    last `decay` share of the steps after a plateau at 1.
    """
    if step <= config.warmup_steps:
        return step / config.warmup_steps
    start = plateau_end(config)
    if step <= start:
        return 1.0
    fallen = (step - start) / (config.steps - start)
    if config.schedule == "cosine":
        fallen = (1 - math.cos(math.pi * fallen)) / 2
    return 1 - (1 - config.final_lr) * fallen


def plateau_end(config: Train) -> int:
    """The last step at the peak. With `wsd` all horizons beyond share the way to here."""
    if config.schedule == "wsd":
        return max(config.warmup_steps, config.steps - round(config.decay * config.steps))
    return config.warmup_steps
