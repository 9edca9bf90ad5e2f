"""What ends a run for good: doing the same again would end it the same way."""

from __future__ import annotations


class NonFiniteError(RuntimeError):
    """A loss, gradient or weight that is not a number. The last checkpoint is from before it."""


class CheckpointError(RuntimeError):
    """A checkpoint of another run: of another architecture, data or other settings."""


class DiskFullError(OSError):
    """No room for a checkpoint. The ones before it are whole."""


class NotCertifiedError(RuntimeError):
    """A model that no audit has found to be causal."""
