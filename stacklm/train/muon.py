"""Muon: the momentum of a matrix, made orthogonal, is its update.

Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/, with the scale of Liu et al. 2025, arXiv:2502.16982: updates
are as large as AdamW's, whatever the shape, so learning rates and weight decay carry over from one to the other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of Jordan et al.: they bring small singular values up fast, and leave all of them between about 0.7 and 1.2."""
ADAMW_SCALE = 0.2
"""The root mean square of AdamW's updates, as measured by Liu et al."""
EPS = 1e-7


class Muon(torch.optim.Optimizer):
    """Muon for the groups whose `role` is matrix, and fused AdamW for the others.

    A parameter [..., E, C] is that many matrices [E, C]: packing layers changes no update. Decay is decoupled.
    """

    def __init__(
        self, groups: list[dict[str, Any]], momentum: float, ns_steps: int, betas: tuple[float, float], eps: float
    ) -> None:
        super().__init__(groups, {"momentum": momentum, "ns_steps": ns_steps, "betas": betas, "eps": eps, "fused": True})

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if group["role"] == "matrix":
                for parameter in parameters:
                    self._update(parameter, group)
            elif parameters:
                self._update_rest(parameters, group)

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state, gradient = self.state[parameter], parameter.grad
        if not state:
            state["momentum"] = torch.zeros_like(gradient)
        average = state["momentum"].lerp_(gradient, 1 - group["momentum"])
        update = orthogonal(gradient.lerp(average, group["momentum"]), group["ns_steps"])  # Nesterov's look ahead
        scale = ADAMW_SCALE * max(parameter.shape[-2:]) ** 0.5
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update, alpha=-group["lr"] * scale)

    def _update_rest(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        for parameter in parameters:
            if not self.state[parameter]:
                zeros = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                self.state[parameter] = {"step": torch.zeros((), device=parameter.device), **zeros}
        states = [self.state[parameter] for parameter in parameters]
        beta1, beta2 = group["betas"]
        adamw(
            parameters,
            [parameter.grad for parameter in parameters],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def orthogonal(x: Tensor, steps: int) -> Tensor:
    """About U V^T for every matrix U S V^T of x [..., E, C], by a Newton-Schulz iteration of batched products.

    In bfloat16 on a GPU, as Jordan et al. do; elsewhere in x's own precision, since few CPUs gain by less.
    """
    a, b, c = COEFFICIENTS
    working = x.to(torch.bfloat16 if x.is_cuda else x.dtype).reshape(-1, *x.shape[-2:])
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        working = working.mT
    working = working / torch.linalg.vector_norm(working, dim=(-2, -1), keepdim=True).clamp(min=EPS)
    for _ in range(steps):
        gram = working @ working.mT
        working = torch.baddbmm(working, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), working, beta=a)
    if tall:
        working = working.mT
    return working.reshape(x.shape).to(x.dtype)
