"""What keeps a step that went wrong away from the model, and says so."""

from __future__ import annotations

import statistics
from collections import deque
from typing import Literal

import torch
from torch import Tensor, nn

from stacklm.train.team import whole


class Guard:
    """Takes optimizer steps, but none whose loss or gradient is not finite, and without waiting for the device.

    The host would have to wait for a number to decide by it. A fused optimizer takes the decision from a tensor instead, as
    from torch's `GradScaler` (its `found_inf`): where that is 1, parameters and moments stay as they are. For any other
    optimizer the host asks. With the policy `stop` all that comes after a bad step is withheld too: the host learns of it
    a step later, and then finds the model as it was before.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, model: nn.Module, clip_norm: float | None, policy: Literal["stop", "skip"]
    ) -> None:
        self.optimizer, self.model, self.clip_norm, self.policy = optimizer, model, clip_norm, policy
        self._fused = getattr(optimizer, "_step_supports_amp_scaling", False)
        self._withheld: Tensor | None = None

    def step(self, loss: Tensor) -> Tensor:
        """Update the model, its gradients clipped, unless that would spoil it; the gradients' norm, a scalar as `loss` is."""
        norm = whole(self._clip())
        bad = ~(loss.isfinite() & norm.isfinite())
        if self.policy == "stop" and self._withheld is not None:
            bad = bad | self._withheld
        self._withheld = bad
        if self._fused:
            self.optimizer.grad_scale, self.optimizer.found_inf = None, bad.float()
            self.optimizer.step()
        elif not bad.item():
            self.optimizer.step()
        return norm

    def _clip(self) -> Tensor:
        parameters = list(self.model.parameters())
        if self.clip_norm is None:
            return nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
        return nn.utils.clip_grad_norm_(parameters, self.clip_norm)


class Spikes:
    """Notices a loss far above those just before: by six standard deviations of the last 50, and by a tenth."""

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=50)

    def note(self, loss: float) -> str | None:
        """What to say about this loss, if anything."""
        said = None
        if len(self._losses) >= 20:
            usual, spread = statistics.mean(self._losses), statistics.stdev(self._losses)
            if loss > max(usual + 6 * spread, 1.1 * usual):
                said = f"the loss jumped to {loss:.3f}; over the last {len(self._losses)} steps it was {usual:.3f} ± {spread:.3f}"
        self._losses.append(loss)
        return said
