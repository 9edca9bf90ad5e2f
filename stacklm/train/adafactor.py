"""Adafactor: of the second moments of a matrix, only the means over its rows and over its columns are kept.

Shazeer & Stern 2018, arXiv:1804.04235, without momentum, as `torch.optim.Adafactor` has it for parameters of one layer each.
That one would factor packed biases over the layers, and scale and clip N packed matrices as one.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

LARGEST_UPDATE = 1.0
"""The root mean square that an update is clipped to before it is scaled, d in the paper."""


class Adafactor(torch.optim.Optimizer):
    """Adafactor for groups with a `role`: a vector's moments are kept in full, all others are matrices.

    A parameter [..., E, C] is that many matrices [E, C], one [..., E] of role vector that many vectors: packing layers
    changes no update. Decay is decoupled.
    """

    def __init__(self, groups: list[dict[str, Any]], beta2_decay: float, eps: float) -> None:
        super().__init__(groups, {"beta2_decay": beta2_decay, "eps": eps})

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state, gradient, lr = self.state[parameter], parameter.grad, group["lr"]
        state["step"] = state.get("step", torch.tensor(0.0)) + 1  # on the CPU, where it can be read without waiting
        step = state["step"].item()
        second_moments, dims = (_of_vectors, (-1,)) if group["role"] == "vector" else (_of_matrices, (-2, -1))
        moments = second_moments(state, gradient, fresh=step ** group["beta2_decay"])
        update = moments.clamp_(min=torch.finfo(moments.dtype).eps ** 2).rsqrt_().mul_(gradient)
        size = _mean_square(parameter, dims).sqrt_().clamp_(min=group["eps"])
        too_large = _mean_square(update, dims).sqrt_().div_(LARGEST_UPDATE).clamp_(min=1)
        update.mul_(size / too_large * min(lr, step**-0.5))
        parameter.mul_(1 - lr * group["weight_decay"]).sub_(update)


def _of_vectors(state: dict[str, Tensor], gradient: Tensor, fresh: float) -> Tensor:
    """The second moments of vectors."""
    if "moments" not in state:
        state["moments"] = torch.zeros_like(gradient)
    return state["moments"].lerp_(gradient.square(), fresh).clone()


def _of_matrices(state: dict[str, Tensor], gradient: Tensor, fresh: float) -> Tensor:
    """The second moments [..., E, C] of matrices, of which the state has the means over C and over E."""
    for name, dim in (("rows", -1), ("columns", -2)):
        mean = _mean_square(gradient, (dim,))
        state[name] = state[name].lerp_(mean, fresh) if name in state else mean * fresh
    rows, columns = state["rows"], state["columns"]
    return rows * (columns / rows.mean(-2, keepdim=True).clamp(min=torch.finfo(rows.dtype).eps))


def _mean_square(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Over those dimensions, which stay with a size of 1."""
    count = math.prod(x.shape[dim] for dim in dims)
    return torch.linalg.vector_norm(x, dim=dims, keepdim=True).square_().div_(count)
