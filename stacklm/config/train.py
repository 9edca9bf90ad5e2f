"""Section `train`: the budget and schedule that all models share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from stacklm.config.schema import Count, Natural, ParamsError, Positive, Range, Share


@dataclass(frozen=True)
class Train:
    """`steps` optimizer steps of `batch_size` windows of `context` tokens each.

    `micro_batch` windows go through the model at once (gradients are accumulated over the rest). The learning
    rate rises over `warmup_steps`, then follows `schedule` down to `final_lr` times its peak (`wsd` stays at the peak
    and decays linearly over the last `decay` share). `threads` is fixed here and not taken from the machine, because sums
    over threads differ in the last bit.
    """

    steps: Count
    context: Count
    batch_size: Count
    micro_batch: Count
    seed: Natural = 1
    warmup_steps: Natural = 20
    schedule: Literal["cosine", "linear", "wsd"] = "cosine"
    decay: Share = 0.2
    final_lr: Share = 0.1
    clip_norm: Positive = 1.0
    valid_every: Count = 50
    valid_tokens: Count = 32_768
    checkpoint_every: Count = 50
    keep_checkpoints: Count = 2
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    threads: Annotated[int, Range(1, 256)] = 2

    def __post_init__(self) -> None:
        if self.batch_size % self.micro_batch:
            raise ParamsError(f"micro_batch: {self.micro_batch} does not divide batch_size {self.batch_size}")
        if self.warmup_steps >= self.steps:
            raise ParamsError(f"warmup_steps: {self.warmup_steps} must be below steps = {self.steps}")

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.context
