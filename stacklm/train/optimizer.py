"""Learning-rate schedules, optimizers with parameter groups by role, and when their steps are taken."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from stacklm.config.optimizer import AdamW as AdamWConfig
from stacklm.config.optimizer import Muon as MuonConfig
from stacklm.config.optimizer import Optimizer
from stacklm.config.train import Train
from stacklm.model.count import roles
from stacklm.train import NonFiniteError
from stacklm.train.distributed import full_tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""From Jordan et al.: they raise small singular values quickly, and leave all of them between about 0.7 and 1.2."""
ADAMW_SCALE = 0.2
"""The RMS of AdamW's updates, as measured by Liu et al."""
EPS = 1e-7
LARGEST_UPDATE = 1.0
"""The RMS to which an Adafactor update is clipped before scaling, d in the paper."""


def lr_factor(step: int, config: Train) -> float:
    """The learning rate as a fraction of its peak, for the update that leads to `step`, 1 to `config.max_steps`.

    It rises linearly to 1 at `warmup_steps`, then decays to `final_lr_fraction` at the last step: by half a cosine (Loshchilov &
    Hutter 2016, 1608.03983), linearly, or (`wsd`: Hu et al. 2024, 2404.06395) linearly over the last `decay_fraction` of the steps
    after a plateau at 1.
    """
    if step <= config.warmup_steps:
        return step / config.warmup_steps
    start = plateau_end(config)
    if step <= start:
        return 1.0
    fallen = (step - start) / (config.max_steps - start)
    if config.lr_schedule == "cosine":
        fallen = (1 - math.cos(math.pi * fallen)) / 2
    return 1 - (1 - config.final_lr_fraction) * fallen


def plateau_end(config: Train) -> int:
    """The last step at the peak. With `wsd` all longer runs have the same learning rates up to here."""
    if config.lr_schedule == "wsd":
        return max(config.warmup_steps, config.max_steps - round(config.decay_fraction * config.max_steps))
    return config.warmup_steps


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set the learning rate of every group to a fraction of its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


def build_optimizer(model: nn.Module, settings: Optimizer) -> torch.optim.Optimizer:
    """Build the optimizer with one group per role; weight decay on matrices only.

    Groups are by role, not by shape: packing N layers makes a gain two-dimensional. Each group keeps its peak learning rate besides
    the current one, for `set_lr`. The first group is that of the matrices.
    """
    groups = _groups(model, settings)
    if isinstance(settings, AdamWConfig):
        return torch.optim.AdamW(groups, betas=(settings.beta1, settings.beta2), eps=settings.eps, fused=True)
    if isinstance(settings, MuonConfig):
        rest = settings.adamw
        return Muon(groups, settings.momentum, settings.ns_steps, (rest.beta1, rest.beta2), rest.eps)
    return Adafactor(groups, settings.beta2_decay, settings.eps)


def _groups(model: nn.Module, settings: Optimizer) -> list[dict[str, Any]]:
    members: dict[str, list[nn.Parameter]] = {"matrix": []}
    for (_, parameter), role in zip(model.named_parameters(), roles(model).values(), strict=True):
        members.setdefault(role, []).append(parameter)
    rest_lr = settings.adamw.peak_lr if isinstance(settings, MuonConfig) else settings.peak_lr
    matrices = {"peak_lr": settings.peak_lr, "weight_decay": settings.weight_decay}
    others = {"peak_lr": rest_lr, "weight_decay": 0.0}
    groups = [{"role": role, "params": found, **(matrices if role == "matrix" else others)} for role, found in members.items()]
    return [group | {"lr": group["peak_lr"]} for group in groups]


class Muon(torch.optim.Optimizer):
    """Orthogonalised momentum updates for matrices; fused AdamW for the groups whose `role` is not matrix.

    Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/, with the scale of Liu et al. 2025, arXiv:2502.16982: updates
    are as large as AdamW's, whatever the shape, so learning rates and weight decay transfer between them.

    A parameter [..., E, C] is treated as a batch of matrices [E, C]: packing layers changes no update. Decay is decoupled.
    """

    def __init__(
        self, groups: list[dict[str, Any]], momentum: float, ns_steps: int, betas: tuple[float, float], eps: float
    ) -> None:
        super().__init__(groups, {"momentum": momentum, "ns_steps": ns_steps, "betas": betas, "eps": eps, "fused": True})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]  # no closure here
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            gradients = _gradients(group)
            if group["role"] == "matrix":
                for parameter, gradient in gradients.items():
                    self._update(parameter, gradient, group)
            elif gradients:
                self._update_rest(gradients, group)

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(gradient)
        average = state["momentum"].lerp_(gradient, 1 - group["momentum"])
        update = orthogonal(gradient.lerp(average, group["momentum"]), group["ns_steps"])  # Nesterov momentum
        scale = ADAMW_SCALE * max(parameter.shape[-2:]) ** 0.5
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update, alpha=-group["lr"] * scale)

    def _update_rest(self, gradients: dict[Tensor, Tensor], group: dict[str, Any]) -> None:
        for parameter in gradients:
            if not self.state[parameter]:
                moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                self.state[parameter] = {"step": torch.zeros((), device=parameter.device), **moments}
        first, second, steps = ([self.state[p][key] for p in gradients] for key in ("exp_avg", "exp_avg_sq", "step"))
        beta1, beta2 = group["betas"]
        options = {"fused": True, "amsgrad": False, "maximize": False}
        rates = {"beta1": beta1, "beta2": beta2, **{key: group[key] for key in ("lr", "weight_decay", "eps")}}
        adamw(list(gradients), list(gradients.values()), first, second, [], steps, **options, **rates)


def orthogonal(x: Tensor, steps: int) -> Tensor:
    """Approximately U V^T for every matrix U S V^T of x [..., E, C], by batched Newton-Schulz iterations.

    In bfloat16 on a GPU, as Jordan et al. do; elsewhere in x's own dtype, since few CPUs are faster with less precision.
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


class Adafactor(torch.optim.Optimizer):
    """Adafactor: keeps only the means over rows and over columns of a matrix's second moments.

    Shazeer & Stern 2018, arXiv:1804.04235, without momentum; for unpacked parameters the same as `torch.optim.Adafactor`, which
    would factor packed biases over the layers, and scale and clip N packed matrices as one. Here groups have a `role`: a parameter
    [..., E, C] is a batch of matrices [E, C]; one [..., E] of role vector is a batch of vectors, whose moments are kept in full.
    Decay is decoupled.
    """

    def __init__(self, groups: list[dict[str, Any]], beta2_decay: float, eps: float) -> None:
        super().__init__(groups, {"beta2_decay": beta2_decay, "eps": eps})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]  # no closure here
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter, gradient in _gradients(group).items():
                self._update(parameter, gradient, group)

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state, lr = self.state[parameter], group["lr"]
        state["step"] = state.get("step", torch.tensor(0.0)) + 1  # on the CPU, where reading it needs no synchronisation
        step = state["step"].item()
        second_moments, dims = (_of_vectors, (-1,)) if group["role"] == "vector" else (_of_matrices, (-2, -1))
        moments = second_moments(state, gradient, fresh=step ** group["beta2_decay"])
        update = moments.clamp_(min=torch.finfo(moments.dtype).eps ** 2).rsqrt_().mul_(gradient)
        size = _mean_square(parameter, dims).sqrt_().clamp_(min=group["eps"])
        too_large = _mean_square(update, dims).sqrt_().div_(LARGEST_UPDATE).clamp_(min=1)
        update.mul_(size / too_large * min(lr, step**-0.5))
        parameter.mul_(1 - lr * group["weight_decay"]).sub_(update)


def _of_vectors(state: dict[str, Tensor], gradient: Tensor, fresh: float) -> Tensor:
    """The second moments of vectors; `fresh` is the weight of the new gradient."""
    if "moments" not in state:
        state["moments"] = torch.zeros_like(gradient)
    return state["moments"].lerp_(gradient.square(), fresh).clone()


def _of_matrices(state: dict[str, Tensor], gradient: Tensor, fresh: float) -> Tensor:
    """The second moments [..., E, C] of matrices, reconstructed from their means over C and over E in the state."""
    for name, dim in (("rows", -1), ("columns", -2)):
        mean = _mean_square(gradient, (dim,))
        state[name] = state[name].lerp_(mean, fresh) if name in state else mean * fresh
    rows, columns = state["rows"], state["columns"]
    return rows * (columns / rows.mean(-2, keepdim=True).clamp(min=torch.finfo(rows.dtype).eps))


def _mean_square(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """The mean square over those dimensions, which are kept with size 1."""
    count = math.prod(x.shape[dim] for dim in dims)
    return torch.linalg.vector_norm(x, dim=dims, keepdim=True).square_().div_(count)


def _gradients(group: dict[str, Any]) -> dict[Tensor, Tensor]:
    """The gradient of every parameter of a group that has one."""
    return {parameter: parameter.grad for parameter in group["params"] if parameter.grad is not None}


class AfterBackward:
    """Optimizer steps, skipped if loss or gradient is NaN or Inf, without synchronising with the device.

    Deciding on the host would require a synchronisation. A fused optimizer reads the decision from a tensor instead, as from
    torch's `GradScaler` (`found_inf`): if it is 1, parameters and moments stay unchanged. For any other optimizer the host
    synchronises. With the policy `stop` all later steps are skipped too: the host learns of the bad one a step later, and then
    the model is still as it was before.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, model: nn.Module, max_grad_norm: float | None, policy: Literal["stop", "skip"]
    ) -> None:
        self.optimizer: Any = optimizer
        self.model, self.max_grad_norm, self.policy = model, max_grad_norm, policy
        self._fused = getattr(optimizer, "_step_supports_amp_scaling", False)
        self._withheld: Tensor | None = None

    def clip_grad_norm(self) -> Tensor:
        """Clip all gradients by their global norm, if a maximum is set; return the norm before clipping, a scalar."""
        if self.max_grad_norm is None:
            gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
            return full_tensor(nn.utils.get_total_norm(gradients))
        return full_tensor(nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm))

    def step(self, loss: Tensor, norm: Tensor) -> None:
        """Take the optimizer's step, unless the loss or norm is NaN or Inf."""
        bad = ~(loss.isfinite() & norm.isfinite())
        if self.policy == "stop" and self._withheld is not None:
            bad = bad | self._withheld
        self._withheld = bad
        if self._fused:
            self.optimizer.grad_scale, self.optimizer.found_inf = None, bad.float()
            self.optimizer.step()
        elif not bad.item():
            self.optimizer.step()


class InBackward:
    """Updates within the backward pass: each parameter's as soon as its gradient is complete, which is then freed.

    As long as the model exists, `loss.backward()` is a whole step, bitwise equal to `optimizer.step()` without clipping; only one
    parameter's gradient exists at a time. Every parameter must get its whole gradient in one backward pass. A pass raises
    `NonFiniteError` before an update that would make its parameter NaN or Inf; parameters earlier in the backward pass have been
    updated by then, so the run must resume from a checkpoint.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
        self.optimizer = optimizer
        self._norms: list[float] = []
        model.zero_grad()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(partial(self._update, name))

    def clip_grad_norm(self) -> Tensor:
        """The norm of all gradients since the last call; the settings rule out clipping."""
        norm = torch.tensor(math.hypot(*self._norms))
        self._norms.clear()
        return norm

    def step(self, loss: Tensor, norm: Tensor) -> None:
        """Does nothing: the backward pass has updated all parameters."""

    def _update(self, name: str, parameter: Tensor) -> None:
        assert parameter.grad is not None
        norm = torch.linalg.vector_norm(parameter.grad).item()
        if not math.isfinite(norm):
            raise NonFiniteError(
                f"the gradient of {name} has the norm {norm}; within a backward pass the parameters behind it are updated "
                "already, so the run resumes from its last checkpoint: lower peak_lr or raise train.warmup_steps"
            )
        self._norms.append(norm)
        self.optimizer.step()  # updates this parameter only: the others have no gradient
        parameter.grad = None
