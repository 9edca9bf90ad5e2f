"""The next-token prediction loss, without ever materialising the logits of all tokens.

Logits are computed for a chunk of rows at a time: R of the B * T positions of a batch. Training computes the gradients of a chunk
together with its loss, while its logits exist; the backward pass only multiplies them by a factor (as in Liger Kernel, Hsu et al.
2024, arXiv:2410.10989). So nothing is computed twice.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stacklm.data.batches import IGNORED
from stacklm.model.layers import Head, LanguageModel, Linear

ROWS = 256
"""Rows per chunk: more do not speed up matrix products, fewer access the head's gradient more often."""

LINEAR = (Head, Linear, nn.Linear)
"""Heads that are one matrix product. Others, such as that of a model whose features are its logits, process all rows at once."""

Arithmetic = Callable[[], AbstractContextManager]
"""Returns the context of forward passes: a null context for float32, or `torch.autocast`."""


class Objective(nn.Module):
    """The training objective: the sum of a model's losses over all targets.

    Every forward pass enters its own `arithmetic()`. Autocast caches rounded weights until it exits; if a later pass reused them,
    their gradients would only arrive at the very end, after FSDP has finished with the sharded weights.
    """

    def __init__(self, model: LanguageModel, arithmetic: Arithmetic = nullcontext) -> None:
        super().__init__()
        self.model, self.arithmetic = model, arithmetic

    def forward(self, inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Minus the summed log-probability of all targets except `IGNORED` ones, in nats: a scalar, float32 or wider."""
        with self.arithmetic():
            features_RC, targets_R = self.model.features(inputs_BT).flatten(0, 1), targets_BT.flatten()
            if type(self.model.head) in LINEAR:
                return _SummedLoss.apply(features_RC, targets_R, *_linear(self.model.head))
            logits_RV = self.model.head(features_RC)
            return F.cross_entropy(logits_RV.to(_wide(logits_RV.dtype)), targets_R, reduction="sum", ignore_index=IGNORED)

    def no_sync(self) -> AbstractContextManager:
        """Context of passes that accumulate gradients without synchronising them; does nothing for one process."""
        return nullcontext()

    def unsharded(self) -> AbstractContextManager:
        """Context of calls to single modules of the model, after forward passes without a backward pass."""
        return nullcontext()

    def gather(self) -> None:
        """Gather the model's full weights for saving; it cannot be trained further."""


@torch.no_grad()
def token_losses(model: LanguageModel, inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
    """Minus the log-probability, in nats, that the model gives each target: [B, T], float32 or wider, without gradients."""
    features_RC = model.features(inputs_BT).flatten(0, 1)
    if type(model.head) not in LINEAR:
        logits_RV = model.head(features_RC)
        return F.cross_entropy(logits_RV.to(_wide(logits_RV.dtype)), targets_BT.flatten(), reduction="none").view_as(targets_BT)
    x_RC, *head = _for_products(features_RC, *_linear(model.head))
    chunks = zip(x_RC.split(ROWS), targets_BT.flatten().split(ROWS), strict=True)
    return torch.cat([_losses(_logits(x, head), targets)[0] for x, targets in chunks]).view_as(targets_BT)


class _SummedLoss(torch.autograd.Function):
    """The sum of the losses of features [R, C] for targets [R], with a head of weight [V, C] and optional bias [V]."""

    @staticmethod
    def forward(ctx, features_RC: Tensor, targets_R: Tensor, *head: Tensor) -> Tensor:
        grad_RC, *head_grads = grads = [torch.zeros_like(part, dtype=_wide(part.dtype)) for part in (features_RC, *head)]
        x_RC, *parts = _for_products(features_RC, *head)
        chunks = zip(x_RC.split(ROWS), targets_R.split(ROWS), grad_RC.split(ROWS), strict=True)
        losses = [_add_gradients(*chunk, parts, *head_grads) for chunk in chunks]
        ctx.save_for_backward(*(grad.to(part.dtype) for grad, part in zip(grads, (features_RC, *head), strict=True)))
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Scales the gradients in place, to avoid a second copy of the weight's; autograd refuses a second backward pass."""
        (factor,) = grad_outputs
        grad_RC, *head_grads = (grad.mul_(factor) for grad in ctx.saved_tensors)
        return grad_RC, None, *head_grads


def _add_gradients(x_RC: Tensor, targets_R: Tensor, out_RC: Tensor, head: list[Tensor], grad_VC: Tensor, *grad_V: Tensor) -> Tensor:
    """Write a chunk's feature gradients and accumulate those of the head; return the sum of its losses."""
    ignored_R = targets_R == IGNORED
    targets_R = targets_R.masked_fill(ignored_R, 0)
    losses_R, exponentials_RV, sums_R = _losses(_logits(x_RC, head), targets_R)
    grad_RV = exponentials_RV.div_(sums_R.masked_fill(ignored_R, torch.inf)[:, None])
    grad_RV[torch.arange(len(x_RC), device=x_RC.device), targets_R] -= (~ignored_R).to(grad_RV.dtype)
    for grad in grad_V:
        grad += grad_RV.sum(0)
    grad_RV = grad_RV.to(x_RC.dtype)
    out_RC.copy_(grad_RV @ head[0])
    if grad_VC.dtype == x_RC.dtype:
        grad_VC.addmm_(grad_RV.T, x_RC)
    else:
        grad_VC += grad_RV.T @ x_RC
    return losses_R.masked_fill(ignored_R, 0).sum()


def _losses(logits_RV: Tensor, targets_R: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Losses [R]; exponentials [R, V], in place of the logits; and their sums [R]. The softmax is their ratio."""
    logits_RV -= logits_RV.amax(1, keepdim=True)
    target_R = logits_RV.gather(1, targets_R[:, None])[:, 0]
    sums_R = logits_RV.exp_().sum(1)
    return sums_R.log() - target_R, logits_RV, sums_R


def _logits(x_RC: Tensor, head: list[Tensor]) -> Tensor:
    logits_RV = F.linear(x_RC, *head)
    return logits_RV.to(_wide(logits_RV.dtype))


def _linear(head: Head) -> list[Tensor]:
    """The weight and, if there is one, the bias."""
    return [part for part in (head.weight, head.bias) if part is not None]


def _for_products(*parts: Tensor) -> list[Tensor]:
    """Cast tensors as autocast, if enabled, would for matrix products: once instead of per chunk."""
    device = parts[0].device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return [part.to(torch.get_autocast_dtype(device)) if autocast else part for part in parts]


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype, but at least float32, for softmax and sums."""
    return torch.promote_types(dtype, torch.float32)
