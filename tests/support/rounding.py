"""How far two ways to compute the same numbers may be apart: from the sizes of what is summed, never from one machine's output."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

SAFETY = 8
"""Roundings are taken as independent; that they are not quite, and that inputs of a sum are rounded too, is allowed for by this."""


def rounding(dtype: torch.dtype, terms: int) -> float:
    """A bound on the difference of two sums of `terms` products in an order of their own, relative to the size of the summands.

    Each addition rounds by up to eps / 2 of the size, at random, so n of them by about eps * sqrt(n) / 2 (Higham and Mary 2019).
    """
    return SAFETY * torch.finfo(dtype).eps * math.sqrt(terms)


def terms_of(model: nn.Module, length: int) -> int:
    """The terms of all sums that a number passes through on its way forward through a model and back, over `length` positions."""
    return 2 * sum(parameter.shape[-1] + length for parameter in model.parameters())


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm()).item()


def assert_same(found: Tensor, wanted: Tensor, terms: int, what: object = "") -> None:
    """Equal but for the rounding of sums of `terms` products, in the narrower of both formats, by the norm of the whole."""
    narrow = max(found.dtype, wanted.dtype, key=lambda dtype: torch.finfo(dtype).eps)
    error, bound = (found.double() - wanted.double()).norm().item(), rounding(narrow, terms) * wanted.double().norm().item()
    assert error <= bound, f"{what}: off by {error:.1e}, rounding explains {bound:.1e}"


def drift(steps: int, terms: int) -> float:
    """A bound on the relative difference of losses after updates whose float32 gradients sum `terms` in another order.

    Every update adds the rounding of its own gradient.
    """
    return steps * rounding(torch.float32, terms)
