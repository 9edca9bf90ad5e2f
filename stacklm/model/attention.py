"""Causal attention where values are narrower than keys, by the kernel that suits the device.

Fused kernels want one head dim, so values of D features are padded to the K of the keys and all work behind the softmax
is done K wide. On a CPU the blocks below do it D wide, and store no T x T map either: a block of queries meets all keys up
to its own end, for as many heads as keep the scores in cache, and the backward pass computes the scores again (as
FlashAttention does, Dao et al. 2022, arXiv:2205.14135, with whole rows in place of a running softmax).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

QUERIES = 128
"""Queries of a block at most: few waste little on keys behind the diagonal, many make good matrix products."""
BLOCKS = 4
"""Blocks of a window at least."""
SCORES = 2**18
"""Scores of a block, 1 MB in float32: what stays in a core's cache."""


def causal_attention(q_BTHK: Tensor, k_BTHK: Tensor, v_BTHD: Tensor) -> Tensor:
    """softmax(q k / sqrt(K)) v over the positions up to each one's own: [B, T, H, D]."""
    key_dim, features = k_BTHK.shape[-1], v_BTHD.shape[-1]
    if key_dim != features and q_BTHK.device.type == "cpu" and q_BTHK.dtype in (torch.float32, torch.float64):
        return blocked_attention(q_BTHK, k_BTHK, v_BTHD)
    if q_BTHK.is_cuda and key_dim % 8 == 0 and features % 8 == 0:  # the memory-efficient kernel takes both dims as they are
        return fused_attention(q_BTHK, k_BTHK, v_BTHD)
    q_BTHK, k_BTHK = (F.pad(part, (0, max(features - key_dim, 0))) for part in (q_BTHK, k_BTHK))
    v_BTHK = F.pad(v_BTHD, (0, max(key_dim - features, 0)))
    return fused_attention(q_BTHK, k_BTHK, v_BTHK, scale=key_dim**-0.5)[..., :features]


def fused_attention(q_BTHK: Tensor, k_BTHK: Tensor, v_BTHD: Tensor, scale: float | None = None) -> Tensor:
    """The device's own kernel: [B, T, H, D]. `scale` is by default 1 / sqrt(K)."""
    q_BHTK, k_BHTK, v_BHTD = (part.transpose(1, 2) for part in (q_BTHK, k_BTHK, v_BTHD))
    return F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTD, is_causal=True, scale=scale).transpose(1, 2)


@torch.library.custom_op("stacklm::blocked_attention", mutates_args=())
def blocked_attention(q_BTHK: Tensor, k_BTHK: Tensor, v_BTHD: Tensor) -> Tensor:
    """The same in blocks; an operation of its own, so that recomputation can keep its result and FLOPs are counted."""
    a_BTHD = q_BTHK.new_empty(*q_BTHK.shape[:3], v_BTHD.shape[-1])
    q_BHTK, k_BHTK, v_BHTD, a_BHTD = (part.transpose(1, 2) for part in (q_BTHK, k_BTHK, v_BTHD, a_BTHD))
    for queries, keys, later in _blocks(q_BHTK):
        weights = _weights(q_BHTK[queries], k_BHTK[keys], later)
        # Matrix products with few rows are several times faster than those with few columns, so this one is transposed.
        a_BHTD[queries] = (v_BHTD[keys].mT @ weights.mT).mT
    return a_BTHD


@torch.library.custom_op("stacklm::blocked_attention_backward", mutates_args=())
def blocked_attention_backward(grad_BTHD: Tensor, q_BTHK: Tensor, k_BTHK: Tensor, v_BTHD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v from that of the result; the scores are computed again."""
    scale = q_BTHK.shape[-1] ** -0.5
    grads = torch.empty_like(q_BTHK), torch.zeros_like(k_BTHK), torch.zeros_like(v_BTHD)
    q_BHTK, k_BHTK, v_BHTD, grad_BHTD = (part.transpose(1, 2) for part in (q_BTHK, k_BTHK, v_BTHD, grad_BTHD))
    dq_BHTK, dk_BHTK, dv_BHTD = (part.transpose(1, 2) for part in grads)
    for queries, keys, later in _blocks(q_BHTK):
        q, k, grad = q_BHTK[queries], k_BHTK[keys], grad_BHTD[queries]
        weights = _weights(q, k, later)
        grad_weights = grad @ v_BHTD[keys].mT
        grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
        dq_BHTK[queries] = torch.bmm(grad_scores, k).mul_(scale)
        dk_BHTK[keys].baddbmm_(grad_scores.mT, q, alpha=scale)
        dv_BHTD[keys] += (grad.mT @ weights).mT
    return grads


def _blocks(q_BHTK: Tensor) -> Iterator[tuple[tuple, tuple, Tensor]]:
    """Where a block's queries and its keys are, and its mask: minus infinity at keys that come after a query, else zero."""
    batch, heads, length, _ = q_BHTK.shape
    size = min(QUERIES, math.ceil(length / BLOCKS))
    for start in range(0, length, size):
        end = min(start + size, length)
        later = q_BHTK.new_full((end - start, end), -math.inf).triu_(1 + start)
        group = max(1, SCORES // later.numel())
        for row in range(batch):
            for head in range(0, heads, group):
                some = slice(head, head + group)
                yield (row, some, slice(start, end)), (row, some, slice(0, end)), later


def _weights(q: Tensor, k: Tensor, later: Tensor) -> Tensor:
    return torch.baddbmm(later, q, k.mT, alpha=q.shape[-1] ** -0.5).softmax(-1)


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
    """As torch counts its own kernels: every query meets every key."""
    return 2 * math.prod(q_BTHK[:3]) * q_BTHK[1] * (q_BTHK[3] + v_BTHD[3])


@register_flop_formula(torch.ops.stacklm.blocked_attention_backward)
def _flops_backward(grad_BTHD, q_BTHK, k_BTHK, v_BTHD, *_, out_shape=None, **__) -> int:
    return 2 * math.prod(q_BTHK[:3]) * q_BTHK[1] * (3 * q_BTHK[3] + 2 * v_BTHD[3])
