"""Causal attention with values narrower than keys, with a kernel for each device.

Fused kernels require a single head dim, so values of D features are padded to the K of the keys and all work after the softmax is
K wide. On a CPU the blocked kernel below keeps it D wide, and does not store the T x T scores either: a block of queries attends
to all keys up to its own end, for several heads at a time per thread, and the backward pass recomputes the scores (as in
FlashAttention, Dao et al. 2022, arXiv:2205.14135, but with whole rows instead of a running softmax).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import register_flop_formula

from stacklm.model.kernels.threads import each

QUERIES = 128
"""Maximum queries per block: with fewer less work is wasted above the diagonal, with more matrix products are more efficient."""
BLOCKS = 4
"""Minimum blocks per sequence."""
SCORES = 2**19
"""Maximum scores per block, 2 MB in float32: with fewer there is more overhead, more take more memory."""


def causal_attention(q_BTHK: Tensor, k_BTHK: Tensor, v_BTHD: Tensor) -> Tensor:
    """softmax(q k / sqrt(K)) v over each position and those before it: [B, T, H, D]."""
    if q_BTHK.device.type == "cpu":
        return blocked_attention(q_BTHK, k_BTHK, v_BTHD)
    return fused_attention(q_BTHK, k_BTHK, v_BTHD)


def project(x_BTC: Tensor, weight_EC: Tensor, bias_E: Tensor | None = None) -> Tensor:
    """x W^T + b, [B, T, E], in the memory layout that the device's attention reads: on a CPU with time innermost."""
    if x_BTC.device.type != "cpu":
        return F.linear(x_BTC, weight_EC, bias_E)
    x_CR = x_BTC.flatten(0, 1).T
    y_ER = weight_EC @ x_CR if bias_E is None else torch.addmm(bias_E[:, None], weight_EC, x_CR)
    return y_ER.unflatten(1, x_BTC.shape[:2]).permute(1, 2, 0)


def sum_heads(a_BTHD: Tensor, heads: int) -> Tensor:
    """The sums over the H = `heads` heads of each of N layers: [B, T, N*H, D] to [B, T, N, D].

    Time is innermost in memory on a CPU; sums that keep this layout are ten times faster.
    """
    return a_BTHD.permute(2, 3, 0, 1).unflatten(0, (-1, heads)).sum(1).permute(2, 3, 0, 1)


def fused_attention(q_BTHK: Tensor, k_BTHK: Tensor, v_BTHD: Tensor) -> Tensor:
    """The device's own kernel. The narrower of K and D is padded with zeros unless the kernel supports different dims."""
    key_dim, features = k_BTHK.shape[-1], v_BTHD.shape[-1]
    both = q_BTHK.is_cuda and key_dim % 8 == 0 and features % 8 == 0  # CUDA's memory-efficient kernel does
    dims = (key_dim, key_dim, features) if both else (max(key_dim, features),) * 3
    parts = zip((q_BTHK, k_BTHK, v_BTHD), dims, strict=True)
    q_BHTK, k_BHTK, v_BHTD = (F.pad(part, (0, dim - part.shape[-1])).transpose(1, 2) for part, dim in parts)
    a_BHTD = F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTD, is_causal=True, scale=key_dim**-0.5)
    return a_BHTD.transpose(1, 2)[..., :features]


@torch.library.custom_op("stacklm::blocked_attention", mutates_args=())
def blocked_attention(q_BTHK: Tensor, k_BTHK: Tensor, v_BTHD: Tensor) -> Tensor:
    """Causal attention in blocks; a custom op, so that activation checkpointing can keep its result and FLOPs are counted.

    Inputs of lower precision are copied to float32, so scores, softmax and sums are as exact as in a fused kernel.
    """
    a_BTHD = torch.empty_like(v_BTHD)
    *inputs, a_BHDT = (part.permute(0, 2, 3, 1) for part in (q_BTHK, k_BTHK, v_BTHD, a_BTHD))

    def attend(piece: tuple[slice, slice]) -> None:
        q, k, v = (_copy(part[piece]) for part in inputs)
        for queries, keys, later in _blocks(q):
            weights = _weights(q[queries], k[keys], later)
            a_BHDT[piece][queries] = v[keys] @ weights.mT  # few rows: several times faster than few columns

    _in_pieces(attend, q_BTHK)
    return a_BTHD


@torch.library.custom_op("stacklm::blocked_attention_backward", mutates_args=())
def blocked_attention_backward(grad_BTHD: Tensor, q_BTHK: Tensor, k_BTHK: Tensor, v_BTHD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v from the output gradient; the scores are recomputed."""
    scale = q_BTHK.shape[-1] ** -0.5
    grads = torch.empty_like(q_BTHK), torch.empty_like(k_BTHK), torch.empty_like(v_BTHD)
    inputs = [part.permute(0, 2, 3, 1) for part in (q_BTHK, k_BTHK, v_BTHD, grad_BTHD)]
    dq_BHKT, dk_BHKT, dv_BHDT = (part.permute(0, 2, 3, 1) for part in grads)

    def attend(piece: tuple[slice, slice]) -> None:
        q, k, v, grad = (_copy(part[piece]) for part in inputs)
        dk, dv = torch.zeros_like(k), torch.zeros_like(v)
        for queries, keys, later in _blocks(q):
            weights = _weights(q[queries], k[keys], later)
            grad_scores = torch.ops.aten._softmax_backward_data(grad[queries].mT @ v[keys], weights, -1, weights.dtype)
            dq_BHKT[piece][queries] = _scaled_product(k[keys], grad_scores.mT, scale)
            dk[keys] += _scaled_product(q[queries], grad_scores, scale)
            dv[keys] += grad[queries] @ weights
        dk_BHKT[piece], dv_BHDT[piece] = dk, dv

    _in_pieces(attend, q_BTHK)
    return grads


def _in_pieces(work: Callable[[tuple[slice, slice]], None], q_BTHK: Tensor) -> None:
    """Split the work by rows and heads over all threads, in pieces with up to `SCORES` scores per block."""
    batch, length, heads, _ = q_BTHK.shape
    threads = torch.get_num_threads()
    pairs = max(1, min(SCORES // (_block(length) * length), math.ceil(batch * heads / threads)))
    rows, group = max(1, pairs // heads), min(heads, pairs)
    some_rows, some_heads = ([slice(i, i + n) for i in range(0, of, n)] for of, n in ((batch, rows), (heads, group)))
    each(work, list(itertools.product(some_rows, some_heads)))


def _blocks(q_BHKT: Tensor) -> Iterator[tuple[tuple, tuple, Tensor]]:
    """Each block's queries and keys as slices, and its causal mask: minus infinity for the keys that come after a query."""
    length = q_BHKT.shape[-1]
    size = _block(length)
    later = q_BHKT.new_full((size, size), -math.inf).triu_(1)
    for start in range(0, length, size):
        end = min(start + size, length)
        yield (..., slice(start, end)), (..., slice(0, end)), later[: end - start, : end - start]


def _block(length: int) -> int:
    """Queries per block."""
    return min(QUERIES, math.ceil(length / BLOCKS))


def _weights(q_BHKQ: Tensor, k_BHKU: Tensor, later_QQ: Tensor) -> Tensor:
    scores_BHQU = _scaled_product(q_BHKQ.mT, k_BHKU, q_BHKQ.shape[2] ** -0.5)
    scores_BHQU[..., -len(later_QQ) :] += later_QQ
    return scores_BHQU.softmax(-1)


def _copy(x: Tensor) -> Tensor:
    """A contiguous copy, at least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32)).contiguous()


def _scaled_product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    product = torch.baddbmm(left.new_empty(1, 1, 1), left.flatten(0, 1), right.flatten(0, 1), beta=0, alpha=scale)
    return product.unflatten(0, left.shape[:2])


@blocked_attention.register_fake
def _(q_BTHK: Tensor, k_BTHK: Tensor, v_BTHD: Tensor) -> Tensor:
    return torch.empty_like(v_BTHD)


@blocked_attention_backward.register_fake
def _(grad_BTHD: Tensor, q_BTHK: Tensor, k_BTHK: Tensor, v_BTHD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q_BTHK), torch.empty_like(k_BTHK), torch.empty_like(v_BTHD)


def _save_inputs(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad_BTHD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return blocked_attention_backward(grad_BTHD, *ctx.saved_tensors)


blocked_attention.register_autograd(_backward, setup_context=_save_inputs)


@register_flop_formula(torch.ops.stacklm.blocked_attention)
def _flops(q_BTHK, k_BTHK, v_BTHD, *_, out_shape=None, **__) -> int:
    """Counted as torch counts its own kernels: every query attends to every key."""
    return 2 * math.prod(q_BTHK[:3]) * q_BTHK[1] * (q_BTHK[3] + v_BTHD[3])


@register_flop_formula(torch.ops.stacklm.blocked_attention_backward)
def _flops_backward(grad_BTHD, q_BTHK, k_BTHK, v_BTHD, *_, out_shape=None, **__) -> int:
    return 2 * math.prod(q_BTHK[:3]) * q_BTHK[1] * (3 * q_BTHK[3] + 2 * v_BTHD[3])


checkpointed = partial(
    checkpoint,
    use_reentrant=False,
    context_fn=partial(create_selective_checkpoint_contexts, [torch.ops.stacklm.blocked_attention.default]),
)
"""`checkpointed(function, *inputs)` runs it with activation checkpointing (Chen et al. 2016, 1604.06174); results are the same.

Only `inputs` and the output of blocked attention, small but most of the work, are kept for the backward pass; it recomputes all
other activations.
"""
