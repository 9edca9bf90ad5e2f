"""Elementwise operations with hand-written gradients.

Autograd's version makes two to three times as many passes over memory, and on a CPU these operations are memory-bound. The plain
definitions are in tests/unit/model/test_elementwise.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, gain_C: Tensor, eps: float | None) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * gain over the last dimension (arXiv:1910.07467). By default eps is that of the dtype."""
    if x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64):
        return _RMSNorm.apply(x, gain_C, torch.finfo(x.dtype).eps if eps is None else eps)
    return F.rms_norm(x, gain_C.shape, gain_C, eps)


def squared_relu(x: Tensor) -> Tensor:
    """relu(x)^2 (arXiv:2109.08668)."""
    return _SquaredReLU.apply(x)


def rotate(x_BTHK: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the pairs (i, i + K/2) by the angles whose cosine and sine are `rotation`, [T, 1, K/2] each.

    The dot product of two vectors then depends on their distance (RoFormer, arXiv:2104.09864).
    """
    return _Rotate.apply(x_BTHK, *(part.to(x_BTHK.dtype) for part in rotation))


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, gain_C: Tensor, eps: float) -> Tensor:
        inverse = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, gain_C, inverse)
        return (x * inverse).mul_(gain_C)

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None]:
        (grad,) = grad_outputs
        x, gain_C, inverse = ctx.saved_tensors
        if x.is_contiguous():
            return *_by_layer_norm(grad.contiguous(), x, gain_C, inverse), None
        y = x * inverse
        products = grad * y
        grad_gain_C = products.sum(tuple(range(x.dim() - 1)))
        shares = products.mul_(gain_C).sum(-1, keepdim=True).div_(-x.shape[-1])
        return (grad * gain_C).addcmul_(y, shares).mul_(inverse), grad_gain_C, None


def _by_layer_norm(grad: Tensor, x: Tensor, gain_C: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of x and gain in one pass, by LayerNorm's kernel with mean zero; the mean that it subtracts is added back."""
    kernel, mean = torch.ops.aten.native_layer_norm_backward, torch.zeros_like(inverse)
    grad_x, grad_gain_C, _ = kernel(grad, x, gain_C.shape, mean, inverse, gain_C, None, [True, True, False])
    return grad_x.addcmul_((grad @ gain_C).unsqueeze(-1), inverse, value=1 / x.shape[-1]), grad_gain_C


class _SquaredReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        y = F.relu(x)
        ctx.save_for_backward(y)
        return y * y

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor) -> Tensor:
        (grad,) = grad_outputs
        (y,) = ctx.saved_tensors
        return torch.addcmul(grad.new_zeros(()), grad, y, value=2)  # 2 y grad in one pass


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_BTHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x_BTHK, cos, sin)

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (grad_BTHK,) = grad_outputs
        cos, sin = ctx.saved_tensors
        return _turned(grad_BTHK, cos, -sin), None, None


def _turned(x_BTHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x_BTHK.chunk(2, dim=-1)
    y_BTHK = torch.empty_like(x_BTHK)
    new_left, new_right = y_BTHK.chunk(2, dim=-1)
    torch.mul(left, cos, out=new_left).addcmul_(right, sin, value=-1)
    torch.mul(right, cos, out=new_right).addcmul_(left, sin)
    return y_BTHK
