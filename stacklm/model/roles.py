"""What each parameter is for. Optimizers group by role, never by the number of dimensions: packed biases have two."""

from __future__ import annotations

from typing import Literal

from torch import nn

from stacklm.model.folded import PackedMap
from stacklm.model.layers import BiasedHead, BiasedLinear, Embedding, Head, Linear, RMSNorm
from stacklm.model.packed import PackedLayerNorm, PackedLinear
from stacklm.model.wiring import Read, ShortConvolution

Role = Literal["embedding", "matrix", "vector", "head"]

ROLES: dict[type[nn.Module], dict[str, Role]] = {
    Embedding: {"weight": "embedding"},
    Linear: {"weight": "matrix"},
    BiasedLinear: {"weight": "matrix", "bias": "vector"},
    PackedLinear: {"weight": "matrix", "bias": "vector"},
    PackedMap: {"weight": "matrix"},
    Head: {"weight": "head"},
    BiasedHead: {"weight": "head", "bias": "vector"},
    nn.LayerNorm: {"weight": "vector", "bias": "vector"},
    RMSNorm: {"weight": "vector"},
    PackedLayerNorm: {"weight": "vector", "bias": "vector"},
    Read: {"weight": "vector"},
    ShortConvolution: {"weight": "vector"},
}


def roles(model: nn.Module) -> dict[str, Role]:
    """The role of every parameter, by its name in `model.named_parameters()`; a tied head counts as the embedding.

    Raises `KeyError` naming the parameter of a module that the table above does not know.
    """
    found = {}
    for name, _ in model.named_parameters():
        module_name, _, parameter_name = name.rpartition(".")
        module = model.get_submodule(module_name)
        try:
            found[name] = ROLES[type(module)][parameter_name]
        except KeyError:
            raise KeyError(f"{name}: no role is written down for `{parameter_name}` of {type(module).__name__}") from None
    return found
