"""Training: one loop, bitwise reproducible on a CPU even if it is killed and resumed.

pretrain     the stage: builds a run, trains it, writes the model
trainer      a run, its loop (`train`) and one optimizer step (`train_step`)
optimizer    learning-rate schedule, parameter groups, AdamW, Muon, Adafactor, and skipping updates that are NaN or Inf
loss         the training objective, in chunks of logits
validate     loss and bits per byte of a token stream
device       device, precision, activation checkpointing, compilation
distributed  several processes: launching, synchronisation, DDP and FSDP
checkpoint   checkpoints on disk
resume       which checkpoints a run may resume from
metrics      the JSONL logs of a run, its timing and memory figures
health       whether every part of a model learns
certificate  the audit's certificate, without which nothing is trained
"""

from __future__ import annotations


class NonFiniteError(RuntimeError):
    """A loss, gradient or weight became NaN or Inf. The last checkpoint is from before that."""


class CheckpointError(RuntimeError):
    """A checkpoint that this run cannot resume from, or logs that do not match it."""


class DiskFullError(OSError):
    """No disk space for a checkpoint. Earlier ones are intact."""


class NotCertifiedError(RuntimeError):
    """A model without a valid certificate of causality."""


class Interrupted(RuntimeError):
    """The run stopped on a signal, after saving a checkpoint."""
