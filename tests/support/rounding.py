"""Tolerances for two ways to compute the same numbers, derived from the sizes of sums, never from the output of one machine."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

SAFETY = 8
"""Safety factor: rounding errors are assumed to be independent, which is not quite true, and inputs of a sum are rounded too."""


def rounding(dtype: torch.dtype, terms: int) -> float:
    """A bound on the difference of two sums of `terms` products in different orders, relative to the size of the summands.

    Each addition rounds by up to eps / 2 of the size, at random, so n of them by about eps * sqrt(n) / 2 (Higham and Mary 2019).
    """
    return SAFETY * torch.finfo(dtype).eps * math.sqrt(terms)


def terms_of(model: nn.Module, length: int) -> int:
    """The total number of terms of the sums in a forward and backward pass of a model over `length` positions."""
    return 2 * sum(parameter.shape[-1] + length for parameter in model.parameters())


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm()).item()


def assert_same(found: Tensor, wanted: Tensor, terms: int, what: object = "") -> None:
    """Assert that tensors are equal up to rounding of sums of `terms` products in the narrower dtype, by the norm of the whole."""
    narrow = max(found.dtype, wanted.dtype, key=lambda dtype: torch.finfo(dtype).eps)
    error, bound = (found.double() - wanted.double()).norm().item(), rounding(narrow, terms) * wanted.double().norm().item()
    assert error <= bound, f"{what}: off by {error:.1e}, rounding explains {bound:.1e}"


def drift(steps: int, terms: int) -> float:
    """A bound on the relative difference of losses after updates whose float32 gradients sum `terms` in another order.

    Every update adds the rounding of its own gradient.
    """
    return steps * rounding(torch.float32, terms)
