import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from stacklm.model.kernels.attention import QUERIES, blocked_attention, causal_attention, fused_attention, project
from support.rounding import assert_same, relative_error, rounding

pytestmark = pytest.mark.numerical

EPS = torch.finfo(torch.bfloat16).eps
LONG = 2 * QUERIES + 41  # three whole blocks and a part of one


def plain_attention(q, k, v):
    length = q.shape[1]
    scores = torch.einsum("bthk,bshk->bhts", q, k) / q.shape[-1] ** 0.5
    weights = scores.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)
    return torch.einsum("bhts,bshd->bthd", weights, v)


def drawn(length, key_dim, features, dtype=torch.float64):
    torch.manual_seed(0)
    q, k = torch.randn(2, 2, length, 3, key_dim, dtype=dtype)
    return [part.requires_grad_() for part in (q.clone(), k.clone(), torch.randn(2, length, 3, features, dtype=dtype))]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("key_dim", "features"), [(8, 1), (8, 5), (8, 8), (5, 8)])
@pytest.mark.parametrize("length", [1, 7, LONG])
@pytest.mark.parametrize("attention", [blocked_attention, fused_attention])
def test_every_kernel_is_plain_attention(attention, length, key_dim, features, dtype):
    parts = drawn(length, key_dim, features, dtype)
    found, wanted = attention(*parts), plain_attention(*parts)
    terms = 2 * (key_dim + features + length)  # of a score, a gradient of one, and an output; forward and back
    assert_same(found, wanted, terms)
    weight = torch.randn_like(wanted)
    for ours, theirs in zip(torch.autograd.grad(found, parts, weight), torch.autograd.grad(wanted, parts, weight), strict=True):
        if length > 1 or theirs.norm() > 0:
            assert_same(ours, theirs, terms)
        else:  # a single position attends to itself whatever its query and key; some kernels leave rounding
            assert ours.norm() < rounding(dtype, terms) * weight.norm()


def test_many_heads_go_through_in_several_groups(monkeypatch):
    parts = drawn(7, 8, 5)
    monkeypatch.setattr("stacklm.model.kernels.attention.SCORES", 1)
    assert_same(blocked_attention(*parts), plain_attention(*parts), 8 + 7)


def test_blocks_see_nothing_later_to_the_last_bit():
    q, k, v = (part.detach() for part in drawn(LONG, 8, 5))
    before = blocked_attention(q, k, v)
    for t in (0, QUERIES - 1, QUERIES, LONG - 2):
        changed = [torch.cat([part[:, : t + 1], torch.randn_like(part[:, t + 1 :])], dim=1) for part in (q, k, v)]
        assert torch.equal(blocked_attention(*changed)[:, : t + 1], before[:, : t + 1])


def test_torch_agrees_that_the_operation_is_well_formed():
    torch.library.opcheck(blocked_attention, tuple(drawn(9, 4, 3)))


def test_no_operation_is_spent_on_padding():
    parts = drawn(LONG, 8, 5, torch.float32)
    with FlopCounterMode(display=False) as counter:
        result = causal_attention(*parts)
        pairs = 2 * 3 * LONG**2  # of queries and keys: torch counts them all, causal or not
        assert counter.get_total_flops() == 2 * pairs * (8 + 5)
        result.sum().backward()
        assert counter.get_total_flops() == 2 * pairs * (8 + 5 + 3 * 8 + 2 * 5)


def test_blocks_of_a_narrow_format_are_as_exact_as_its_rounding():
    wide = drawn(LONG, 8, 5)
    parts = [part.detach().bfloat16().requires_grad_() for part in wide]
    found, wanted = causal_attention(*parts), plain_attention(*wide)
    assert found.dtype == torch.bfloat16
    assert relative_error(found.double(), wanted) < EPS  # inputs and output are rounded by eps / 2, and averages by less
    weight = torch.randn_like(wanted)
    for ours, theirs in zip(
        torch.autograd.grad(found, parts, weight.bfloat16()), torch.autograd.grad(wanted, wide, weight), strict=True
    ):
        assert ours.dtype == torch.bfloat16
        assert relative_error(ours.double(), theirs) < 3 * EPS  # of q, k, v, the gradient and the result


def test_autocast_rounds_nothing_within():
    parts, results = [part.detach().bfloat16().requires_grad_() for part in drawn(LONG, 8, 5)], []
    for rounds in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=rounds):
            found = blocked_attention(*parts)
            results.append([found, *torch.autograd.grad(found, parts, found.detach())])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("bias", [None, torch.randn(6)])
def test_projections_are_linear_maps_with_time_innermost(bias):
    x, weight = torch.randn(2, 5, 4), torch.randn(6, 4)
    found = project(x, weight, bias)
    assert_same(found, F.linear(x, weight, bias), 4 + 1)
    assert found.stride(1) == 1
