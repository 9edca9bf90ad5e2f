"""All architecture variants at test size, the larger bases on which they must also build, and helpers for models."""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stacklm.config.model import Stack, Stacked
from stacklm.model.build import PRESETS
from stacklm.model.variants import variants

VOCAB, CONTEXT = 40, 12
TINY = Stacked(d_model=16, n_heads=2, stacks=(Stack(4, 4, 24), Stack(4, 4, 24), Stack(4, 8, 32)))
VARIANTS = variants(TINY, CONTEXT)
LAPTOP = Stacked(d_model=128, n_heads=4, stacks=(Stack(16, 8, 512), Stack(16, 16, 1024)))
BASES = {"laptop": (LAPTOP, 4096, 256), **{name: (c.architecture, c.vocab_size, c.context_length) for name, c in PRESETS.items()}}
M = TypeVar("M", bound=nn.Module)


def scattered(module: M, share: float = 0.3) -> M:
    """The module with noise added to all parameters, so that none is zero or one and each matters."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(share * torch.randn_like(parameter))
    return module


def loss_of(model: nn.Module, ids_BT: Tensor) -> Tensor:
    """The mean next-token prediction loss."""
    return F.cross_entropy(model(ids_BT[:, :-1]).flatten(0, 1), ids_BT[:, 1:].flatten())


def gradients(model: nn.Module, ids_BT: Tensor) -> dict[str, Tensor]:
    """The gradients of that loss, by the names of the trained parameters."""
    model.zero_grad()
    loss_of(model, ids_BT).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


def overfit(model: nn.Module, steps: int = 150) -> float:
    """The loss on one batch after `steps` steps on it."""
    ids_BT = torch.randint(VOCAB, (4, CONTEXT + 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        gradients(model, ids_BT)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return loss_of(model, ids_BT).item()
