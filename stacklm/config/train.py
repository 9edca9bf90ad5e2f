"""Section `train`: the budget and schedule shared by all models, and the hardware that a run uses."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from stacklm.config.optimizer import AdamW, Optimizer
from stacklm.config.schema import Count, Natural, ParamsError, Positive, Range, Share, Size

MOST_TOKENS = 2**31
"""Maximum tokens per step, so that the sizes of its tensors fit into 64 bits."""
Context = Annotated[int, Range(1, 2**24)]
"""Tokens that a model attends to."""


@dataclass(frozen=True)
class Train:
    """The budget and schedule shared by all models, and the hardware that a run uses.

    `micro_batch_size`, `activation_checkpointing`, `compile`, `nproc`, `strategy` and `threads` change memory, time and
    rounding, nothing else. With `wsd` a run with a larger `max_steps` also resumes from an earlier one.
    """

    max_steps: Annotated[int, Range(1, 10**9)]
    """The horizon: optimizer steps of the whole learning-rate schedule."""
    context_length: Context
    """Tokens per sequence."""
    global_batch_size: Size
    """Sequences per optimizer step."""
    micro_batch_size: Size
    """Sequences per forward pass; gradients are accumulated over the batch."""
    seed: Natural = field(default=1, metadata={"hidden": True})
    """Seed of initial weights and sequence order: one of `seeds` in params.yaml, where this section has no such key."""
    hard_stop: Count | None = None
    """Stop at this step, before max_steps; a run with a later stop resumes from an earlier one with the same learning rates."""
    warmup_steps: Natural = 20
    """Steps over which the learning rate rises to its peak."""
    lr_schedule: Literal["cosine", "linear", "wsd"] = "cosine"
    """How the learning rate falls after warm-up. wsd: stays at the peak and decays linearly at the end."""
    decay_fraction: Share = 0.2
    """The last fraction of max_steps, in which wsd decays."""
    final_lr_fraction: Share = 0.1
    """The learning rate at max_steps, as a fraction of its peak."""
    max_grad_norm: Positive | None = 1.0
    """Clip gradients to this global norm; null: never."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What to do if a loss or gradient becomes NaN or Inf: stop, or skip that batch."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: matrix products in bfloat16; weights, sums and optimizer state stay in float32."""
    activation_checkpointing: Literal["none", "full"] = "none"
    """full: keep the input of every stack or block, and recompute the rest, except blocked attention, in the backward pass."""
    compile: bool = False
    """Compile the model with torch.compile: slower start, faster steps."""
    nproc: Annotated[int, Range(1, 1024)] = 1
    """Processes that share every batch, each with its own GPU if there are any."""
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """ddp: each process has the whole model. fsdp: weights and optimizer state are sharded."""
    eval_every: Count = 50
    """Steps between evaluations of the validation loss."""
    eval_tokens: Count = 32_768
    """Validation tokens per evaluation."""
    checkpoint_every: Count = 50
    """Steps between checkpoints."""
    keep_checkpoints: Count = 2
    """Number of latest checkpoints to keep, besides the best one."""
    keep_every: Natural = 0
    """Steps between checkpoints that are kept permanently; 0: none."""
    resume: Literal["bitwise", "compatible"] = "bitwise"
    """bitwise: only from checkpoints that lead to bitwise equal results. compatible: also from those that differ by rounding."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to train; auto: a GPU if there is one."""
    threads: Annotated[int, Range(1, 256)] = 2
    """CPU threads per process. Fixed here, not taken from the machine, because sums over threads differ in the last bit."""

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
        """How the tokens per step are made up, in words."""
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
    """Only the settings that affect a forward and backward pass; all others are those of the shortest possible training."""
    return Train(max_steps=1, warmup_steps=0, **{name: getattr(train, name) for name in PASSES})


def check_team(train: Train, optimizer: Optimizer, processes: int) -> None:
    """Raise `ParamsError` unless that many processes can train a model together with that optimizer."""
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
