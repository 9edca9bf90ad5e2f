"""Training: one loop, which on a CPU gives the same bits however often it is killed and resumed.

pretrain     the stage: builds a run, trains it, writes the model
trainer      a run, its loop (`train`) and one optimizer step (`train_step`)
optimizer    learning-rate schedule, parameter groups, AdamW, Muon, Adafactor, and steps that withhold NaN
loss         the training objective, in chunks of logits
validate     loss and bits per byte of a stream of tokens
device       device, precision, activation checkpointing, compilation
distributed  several processes: starting them, agreeing, sharing a model (DDP, FSDP)
checkpoint   checkpoints on disk
resume       which checkpoints a run may resume from
metrics      the files of rows that a run writes, and what it measures of itself
health       whether every part of a model learns
certificate  the audit's certificate, without which nothing is trained
"""

from __future__ import annotations


class NonFiniteError(RuntimeError):
    """A loss, gradient or weight that is NaN or Inf. The last checkpoint is from before it."""


class CheckpointError(RuntimeError):
    """A checkpoint that this run cannot resume from, or logs that do not lead to it."""


class DiskFullError(OSError):
    """No room for a checkpoint. The ones before it are whole."""


class NotCertifiedError(RuntimeError):
    """A model that no audit has found to be causal."""


class Interrupted(RuntimeError):
    """The run was asked to stop, and did, with a checkpoint."""
