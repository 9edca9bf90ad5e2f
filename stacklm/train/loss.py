"""The loss of next-token prediction, token by token. Means and masks are the caller's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


def token_losses(model: nn.Module, inputs_BT: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
    """Minus the log-probability, in nats, that the model gives each target: float [B, T]."""
    logits_BTV = model(inputs_BT)
    return F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), reduction="none").view_as(targets_BT)
