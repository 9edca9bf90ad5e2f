"""Section `train`: the budget and schedule that all models share, and what a run may take of the machine."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from stacklm.config.optimizer import AdamW, Optimizer
from stacklm.config.schema import Count, Natural, ParamsError, Positive, Range, Share, Size

MOST_TOKENS = 2**31
"""Tokens of a step. Sizes of its tensors stay within 64 bits."""
Context = Annotated[int, Range(1, 2**24)]
"""Tokens that a model sees at once."""


@dataclass(frozen=True)
class Train:
    """The budget and schedule that all models share, and what a run may take of the machine.

    `micro_batch_size`, `activation_checkpointing`, `compile`, `nproc`, `strategy` and `threads` change memory, time and
    rounding, nothing else. With `wsd` a later horizon, too, resumes from an earlier run.
    """

    max_steps: Annotated[int, Range(1, 10**9)]
    """The horizon: optimizer steps until the learning rate has come down."""
    context_length: Context
    """Tokens of a sequence."""
    global_batch_size: Size
    """Sequences per optimizer step."""
    micro_batch_size: Size
    """Sequences per forward pass; gradients are accumulated over the rest of the batch."""
    seed: Natural = field(default=1, metadata={"hidden": True})
    """Of the initial weights and of the order of the sequences: one of `seeds` of params.yaml, which has no such key here."""
    hard_stop: Count | None = None
    """Training ends at this step, before the horizon; a later one resumes from an earlier run on the same curve."""
    warmup_steps: Natural = 20
    """Steps over which the learning rate rises to its peak."""
    lr_schedule: Literal["cosine", "linear", "wsd"] = "cosine"
    """How the learning rate falls after warm-up. wsd: it stays at the peak and decays linearly at the end."""
    decay_fraction: Share = 0.2
    """The last share of the horizon, in which wsd decays."""
    final_lr_fraction: Share = 0.1
    """The learning rate at the horizon, as a fraction of its peak."""
    max_grad_norm: Positive | None = 1.0
    """Gradients with a larger norm are scaled down to it; null: never."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What to do where a loss or gradient becomes NaN or Inf: stop, or skip that batch."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: products are computed in bfloat16; weights, sums and optimizer stay in float32."""
    activation_checkpointing: Literal["none", "full"] = "none"
    """full: only the input of every stack or block is kept, and the rest is computed again."""
    compile: bool = False
    """Compile the model with torch.compile: a slow start and faster steps."""
    nproc: Annotated[int, Range(1, 1024)] = 1
    """Processes that share every batch, each with a GPU of its own if there are any."""
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """ddp: each process has the whole model. fsdp: each keeps a part of weights and optimizer state."""
    eval_every: Count = 50
    """Steps between two measurements of the validation loss."""
    eval_tokens: Count = 32_768
    """Validation tokens of each measurement."""
    checkpoint_every: Count = 50
    """Steps between two checkpoints."""
    keep_checkpoints: Count = 2
    """How many of the last checkpoints are kept, beside the best one."""
    keep_every: Natural = 0
    """Steps between checkpoints that are kept for good; 0: none."""
    resume: Literal["bitwise", "compatible"] = "bitwise"
    """bitwise: only from checkpoints that lead to the same bits. compatible: also from those that differ by rounding."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to train; auto: a GPU if there is one."""
    threads: Annotated[int, Range(1, 256)] = 2
    """CPU threads of each process. Fixed here and not taken from the machine: sums over threads differ in the last bit."""

    def __post_init__(self) -> None:
        if self.tokens_per_step > MOST_TOKENS:
            raise ParamsError(
                f"global_batch_size: {self.global_batch_size} * context_length {self.context_length} = {self.tokens_per_step} "
                f"tokens, above {MOST_TOKENS}"
            )
        if self.global_batch_size % self.micro_batch_size:
            raise ParamsError(
                f"micro_batch_size: {self.micro_batch_size} does not divide global_batch_size {self.global_batch_size}"
            )
        if self.warmup_steps >= self.max_steps:
            raise ParamsError(f"warmup_steps: {self.warmup_steps} must be below max_steps = {self.max_steps}")
        if self.hard_stop and self.hard_stop > self.max_steps:
            raise ParamsError(
                f"hard_stop: {self.hard_stop} is beyond the horizon of max_steps = {self.max_steps}; "
                "raise max_steps, or leave it out"
            )

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch_size * self.context_length

    @property
    def batch_arithmetic(self) -> str:
        """How a step comes to its tokens, in words."""
        passes = -(-self.global_batch_size // (self.nproc * self.micro_batch_size))
        each = f", on each of {self.nproc} processes" if self.nproc > 1 else ""
        return (
            f"{self.global_batch_size} sequences * {self.context_length:,} tokens = {self.tokens_per_step:,} tokens per step, "
            f"in {passes} {'pass' if passes == 1 else 'passes'} of up to {self.micro_batch_size} sequences{each}"
        )

    @property
    def last_step(self) -> int:
        """The step at which training ends."""
        return self.hard_stop or self.max_steps


PASSES = (
    "context_length",
    "global_batch_size",
    "micro_batch_size",
    "precision",
    "activation_checkpointing",
    "compile",
    "device",
    "threads",
)


def passes(train: Train) -> Train:
    """Only the settings of a forward and backward pass: those of the schedule and the rest are as in the shortest training."""
    return Train(max_steps=1, warmup_steps=0, **{name: getattr(train, name) for name in PASSES})


def check_team(train: Train, optimizer: Optimizer, processes: int) -> None:
    """Raise `ParamsError` unless so many processes can train a model with that optimizer together."""
    if train.global_batch_size % processes:
        raise ParamsError(
            f"nproc: {processes} cannot share a batch of global_batch_size = {train.global_batch_size} sequences equally"
        )
    if processes > 1 and optimizer.optimizer_in_backward:
        raise ParamsError(
            f"nproc: {processes} need all gradients before they update; optimizer.optimizer_in_backward must be false"
        )
    if processes > 1 and train.strategy == "fsdp" and not isinstance(optimizer, AdamW):
        raise ParamsError(f"strategy: fsdp cuts matrices, which {optimizer.kind} needs whole; choose ddp, or the optimizer adamw")
