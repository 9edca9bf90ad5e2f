"""The batch of the next step, made while the device works on this one."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from stacklm.data.batches import TrainBatches


class Prefetch:
    """Batches as `TrainBatches` gives them, ready when they are asked for in order; in any other order they are made anew.

    For a GPU they lie in pinned memory, from which a copy runs beside all else.
    """

    def __init__(self, batches: TrainBatches, device: torch.device) -> None:
        self._batches, self._pinned = batches, device.type == "cuda"
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
        self._ahead: tuple[int, Future] | None = None

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of a step, int64 [B, T] each. Raises what `TrainBatches` raises."""
        ready = self._ahead and self._ahead[0] == step
        made = self._ahead[1].result() if ready else self._make(step)
        self._ahead = step + 1, self._worker.submit(self._make, step + 1)
        return made

    def indices(self, step: int) -> list[int]:
        """The windows of a step's batch, in its order."""
        return self._batches.indices(step)

    def _make(self, step: int) -> tuple[Tensor, Tensor]:
        inputs_BT, targets_BT = self._batches.batch(step)
        return (inputs_BT.pin_memory(), targets_BT.pin_memory()) if self._pinned else (inputs_BT, targets_BT)
