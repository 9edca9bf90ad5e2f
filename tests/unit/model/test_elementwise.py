"""Values and gradients equal those of the plain definitions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from stacklm.model.kernels.elementwise import rms_norm, rotate, squared_relu
from stacklm.model.layers import rotations
from support.rounding import assert_same

pytestmark = pytest.mark.numerical

LAYOUTS = {
    "contiguous": lambda x_BTHK: x_BTHK,
    "time innermost": lambda x_BTHK: x_BTHK.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1),
    "every second": lambda x_BTHK: x_BTHK.repeat_interleave(2, dim=-1)[..., ::2],
}
every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
every_dtype = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)


def plain_norm(x: Tensor, gain_C: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * gain_C


def plain_rotation(x_BTHK: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = (part.to(x_BTHK.dtype) for part in rotation)
    left, right = x_BTHK.chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, left * sin + right * cos], dim=-1)


def drawn(seed: int = 0) -> tuple[Tensor, Tensor]:
    """An input [B, T, H, K] and a gradient in float64."""
    generator = torch.Generator().manual_seed(seed)
    x, grad = torch.randn(2, 2, 5, 3, 8, generator=generator, dtype=torch.float64)
    return x, grad


def check(found: Callable, wanted: Callable, layout: Callable, dtype: torch.dtype, *others: Tensor) -> None:
    """Against the plain form in float64 of the same rounded numbers."""
    x, grad = (part.to(dtype) for part in drawn())
    inputs = [part.to(dtype).requires_grad_() for part in (x, *others)]
    exact = [part.detach().double().requires_grad_() for part in inputs]
    y = found(layout(inputs[0] * 1), *inputs[1:])
    right = wanted(*exact)
    y.backward(grad)
    right.backward(grad.double())
    for ours, theirs in [(y, right), *((a.grad, b.grad) for a, b in zip(inputs, exact, strict=True))]:
        assert ours.dtype == dtype
        assert_same(ours, theirs, 8)  # K terms, where there is a sum


@every_layout
@every_dtype
def test_normalisation(layout, dtype) -> None:
    gain_C = torch.linspace(0.5, 2, 8)
    check(lambda x, gain: rms_norm(x, gain, 1e-3), lambda x, gain: plain_norm(x, gain, 1e-3), layout, dtype, gain_C)


def test_normalisation_of_zeros_is_zero_with_finite_gradients() -> None:
    x, gain_C = torch.zeros(2, 8, requires_grad=True), torch.ones(8, requires_grad=True)
    y = rms_norm(x, gain_C, None)
    y.sum().backward()
    assert not y.any() and x.grad.isfinite().all() and not gain_C.grad.any()
    torch.testing.assert_close(x.grad, torch.full((2, 8), torch.finfo(torch.float32).eps ** -0.5))


@every_layout
@every_dtype
def test_squared_relu(layout, dtype) -> None:
    check(squared_relu, lambda x: F.relu(x).square(), layout, dtype)


@every_layout
@every_dtype
def test_rotation(layout, dtype) -> None:
    rotation = rotations(torch.arange(5.0), 8)
    check(lambda x: rotate(x, rotation), lambda x: plain_rotation(x, rotation), layout, dtype)
