"""Roles and FLOPs of models that do not declare them: roles by module type, FLOPs by running the model.

Dimension letters: B batch, T time, V vocabulary.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from stacklm.config.model import Role
from stacklm.model.layers import DenseSkip, Embedding, Head, Linear, PackedLayerNorm, PackedLinear, RMSNorm, ShortConv

ROLES: dict[type[nn.Module], dict[str, Role]] = {
    Embedding: {"weight": "embedding"},
    Linear: {"weight": "matrix", "bias": "vector"},
    PackedLinear: {"weight": "matrix", "bias": "vector"},
    Head: {"weight": "head", "bias": "vector"},
    nn.LayerNorm: {"weight": "vector", "bias": "vector"},
    RMSNorm: {"weight": "vector"},
    PackedLayerNorm: {"weight": "vector", "bias": "vector"},
    DenseSkip: {"weight": "vector"},
    ShortConv: {"weight": "vector"},
}
MATRICES = (nn.Linear, nn.Bilinear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)
HEADS = ("head", "lm_head", "output")


def roles_by_type(model: nn.Module, vocab_size: int, role_of: Callable[[str], str | None]) -> dict[str, Role | None]:
    """The role of every parameter by name: from `role_of`, else from the type of its module; None if unknown.

    A parameter with several names, such as a tied head, is an embedding if any of them has that role.
    """
    head = head_of(model, vocab_size)
    found: defaultdict[int, list[tuple[str, Any]]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner, _, own = name.rpartition(".")
        role = role_of(name) or _by_type(model.get_submodule(owner), own, parameter, head)
        found[id(parameter)].append((name, role))
    return {names[0][0]: "embedding" if any(role == "embedding" for _, role in names) else names[0][1] for names in found.values()}


def head_of(model: nn.Module, vocab_size: int) -> nn.Module | None:
    """The module that outputs `vocab_size` logits: found by name, else the last one of that width; None if there is none."""
    maps = {name: module for name, module in model.named_modules() if getattr(module, "out_features", None) == vocab_size}
    named = [module for name, module in maps.items() if name.rpartition(".")[2] in HEADS]
    return [None, *maps.values(), *named][-1]


def _by_type(module: nn.Module, own: str, parameter: nn.Parameter, head: nn.Module | None) -> Role | None:
    if module is head and own == "weight":
        return "head"
    if known := ROLES.get(type(module)):
        return known.get(own)
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return "embedding"
    if parameter.ndim <= 1 or own.startswith("bias"):  # `bias_k` and `bias_v` of `nn.MultiheadAttention` have three dimensions
        return "vector"
    if isinstance(module, nn.Conv1d) and module.groups == module.in_channels:  # depthwise: channels are not mixed
        return "vector"
    foreign = type(module).__module__.startswith("transformers.")  # users cannot add `role_of` to it
    return "matrix" if foreign or isinstance(module, MATRICES) else None


def flops(model: nn.Module, ids_BT: Tensor) -> int:
    """The FLOPs of one call, as torch counts them on any device: matrix products, and causal attention without masked positions.

    Attention written as matrix products counts as computed, over all positions.
    """
    from torch.utils.flop_counter import FlopCounterMode

    unseen = 0

    def note(module: nn.LSTM, inputs: Any, output: Any) -> None:
        nonlocal unseen
        unseen += 2 * sum(p.numel() for p in module.parameters() if p.ndim == 2) * output[0].shape[:-1].numel()

    attention, hooks = CausalAttention(), []
    if not ids_BT.is_meta:  # on real devices a fused kernel hides an LSTM's products
        hooks = [module.register_forward_hook(note) for module in model.modules() if isinstance(module, nn.LSTM)]
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter, attention:
            model(ids_BT)
    finally:
        for hook in hooks:
            hook.remove()
    return counter.get_total_flops() + attention.flops + unseen


class CausalAttention(TorchFunctionMode):
    """Inside the block, causal `scaled_dot_product_attention` returns zeros and its FLOPs are added to `flops`."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_function__(self, func: Any, types: object, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is SDPA:
            return self.attention(*args, **kwargs)
        if func is not F.multi_head_attention_forward:
            return func(*args, **kwargs)
        F.scaled_dot_product_attention = self.attention  # its own calls bypass this mode
        try:
            return func(*args, **kwargs)
        finally:
            F.scaled_dot_product_attention = SDPA

    def attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **options: Any,
    ) -> Tensor:
        """Same signature as torch's function."""
        if not is_causal:
            return SDPA(query, key, value, attn_mask, dropout_p, is_causal, **options)
        pairs = sum(min(t + 1, key.shape[-2]) for t in range(query.shape[-2]))
        self.flops += 2 * query.shape[:-2].numel() * pairs * (query.shape[-1] + value.shape[-1])
        return value.new_zeros(*query.shape[:-1], value.shape[-1])


SDPA: Any = F.scaled_dot_product_attention
