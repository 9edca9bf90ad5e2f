"""Section `train`: the budget and schedule that all models share, and what a run may take of the machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from stacklm.config.optimizer import AdamW, Optimizer
from stacklm.config.schema import Count, Natural, ParamsError, Positive, Range, Share


@dataclass(frozen=True)
class Train:
    """A horizon of `steps` optimizer steps of `batch_size` windows of `context` tokens each.

    The learning rate rises over `warmup_steps`, then follows `schedule` down to `final_lr` times its peak at the horizon
    (`wsd` stays at the peak and decays linearly over the last `decay` share). Training ends there, or at `stop_step` before it;
    a later `stop_step`, and with `wsd` a later horizon, goes on from where an earlier run has come on the same curve.

    What changes results by rounding at most, and the memory or the time that is taken:

    `micro_batch`     windows that go through the model at once; gradients are accumulated over the rest.
    `recompute`       stacks: of every stack or block only the input is kept, and the rest computed again.
    `layers_at_once`  parallel layers of a stack that run side by side, the others computed after them. 0: all.
    `compile`         the model is compiled by torch.compile: a slow start, and faster steps.
    `processes`       that train the model together, each on its part of every batch and, if there are any, its own GPU.
    `parallel`        ddp: each has the whole model. fsdp: each keeps a part of weights and optimizer state; for large ones.
    `threads`         of each process; fixed here and not taken from the machine, because sums over threads differ in the last bit.

    Gradients longer than `clip_norm` are shortened to it (null: none are). `precision` bf16 multiplies in bfloat16, with
    weights, sums and optimizer in float32. `non_finite`: at a loss or gradient that is no number, stop, or skip that batch.
    `resume` exact goes on from checkpoints that lead to the same bits only; close also from those of a run that differs by
    rounding, such as another `micro_batch`. Kept are the last `keep_checkpoints`, the best, and one every `milestone_every` steps
    (0: none).
    """

    steps: Count
    context: Count
    batch_size: Count
    micro_batch: Count
    seed: Natural = 1
    stop_step: Count | None = None
    warmup_steps: Natural = 20
    schedule: Literal["cosine", "linear", "wsd"] = "cosine"
    decay: Share = 0.2
    final_lr: Share = 0.1
    clip_norm: Positive | None = 1.0
    non_finite: Literal["stop", "skip"] = "stop"
    precision: Literal["fp32", "bf16"] = "fp32"
    recompute: Literal["nothing", "stacks"] = "nothing"
    layers_at_once: Natural = 0
    compile: bool = False
    processes: Annotated[int, Range(1, 1024)] = 1
    parallel: Literal["ddp", "fsdp"] = "ddp"
    valid_every: Count = 50
    valid_tokens: Count = 32_768
    checkpoint_every: Count = 50
    keep_checkpoints: Count = 2
    milestone_every: Natural = 0
    resume: Literal["exact", "close"] = "exact"
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    threads: Annotated[int, Range(1, 256)] = 2

    def __post_init__(self) -> None:
        if self.batch_size % self.micro_batch:
            raise ParamsError(f"micro_batch: {self.micro_batch} does not divide batch_size {self.batch_size}")
        if self.warmup_steps >= self.steps:
            raise ParamsError(f"warmup_steps: {self.warmup_steps} must be below steps = {self.steps}")
        if self.stop_step and self.stop_step > self.steps:
            raise ParamsError(
                f"stop_step: {self.stop_step} is beyond the horizon of steps = {self.steps}; raise steps, or leave it out"
            )

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.context

    @property
    def batch_arithmetic(self) -> str:
        """How a step comes to its tokens, in words."""
        passes = -(-self.batch_size // (self.processes * self.micro_batch))
        each = f", on each of {self.processes} processes" if self.processes > 1 else ""
        return (
            f"{self.batch_size} windows * {self.context:,} tokens = {self.tokens_per_step:,} tokens a step, "
            f"in {passes} {'pass' if passes == 1 else 'passes'} of up to {self.micro_batch} windows{each}"
        )

    @property
    def last_step(self) -> int:
        """The step at which training ends."""
        return self.stop_step or self.steps


def check_team(train: Train, optimizer: Optimizer, processes: int) -> None:
    """Raise `ParamsError` unless so many processes can train a model with that optimizer together."""
    if train.batch_size % processes:
        raise ParamsError(f"processes: {processes} cannot share a batch of batch_size = {train.batch_size} windows equally")
    if processes > 1 and optimizer.in_backward:
        raise ParamsError(f"processes: {processes} need all gradients before they update; optimizer.in_backward must be false")
    if processes > 1 and train.parallel == "fsdp" and not isinstance(optimizer, AdamW):
        raise ParamsError(f"parallel: fsdp cuts matrices, which {optimizer.kind} needs whole; choose ddp, or the optimizer adamw")
