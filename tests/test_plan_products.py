"""Products inside of an operation of our own are counted, whatever the number of threads."""

from __future__ import annotations

import pytest
import torch

from stacklm.model.attention import blocked_attention
from stacklm.plan.products import KERNEL, Products


@pytest.mark.parametrize("threads", [1, 3])
def test_the_products_within_attention_are_counted_on_any_number_of_threads(threads: int) -> None:
    """Four blocks, and in each the scores and the sums: two products of a shape of their own."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        products = Products()
        parts = tuple(torch.empty(2, 40, 6, dim, device="meta") for dim in (8, 8, 3))
        products.note(blocked_attention._opoverload, parts)
        assert products.bytes == 8 * KERNEL
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
