"""Decoding that remembers, so that a token is read once.

A decoder is the model's own tree of modules with the same parameters. Only the leaves that look across time are others:
they keep what they need of the tokens so far. Two things can be kept:

    KEYS_AND_VALUES   of every head: works for every model
    INPUTS            x_s alone, C numbers a stack. Without rotary positions every key and value is a linear map of it, so
                      the maps move onto the query and behind the sum: (x W_q) . (x_u W_k) = (x W_q W_k^T) . x_u
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stacklm.model.dense import Attention
from stacklm.model.folded import FoldedAttention, SharedAttention
from stacklm.model.packed import FoldedOutputs, FoldedValues, PackedAttention
from stacklm.model.positions import Positions
from stacklm.model.wiring import ShortConvolution


class Cache:
    """How many tokens were read, and what is kept of them; U is the number of all tokens so far."""

    def __init__(self, context: int) -> None:
        self.context, self.tokens = context, 0
        self._pasts: list[Past] = []

    def past(self) -> Past:
        """Something more to keep."""
        self._pasts.append(Past(self))
        return self._pasts[-1]

    @property
    def bytes_per_token(self) -> int:
        """Of one sequence; 0 before the first token."""
        return sum(past.bytes_per_token for past in self._pasts)


class Past:
    """One tensor of the tokens so far, time in the last dimension but one. It takes room for the whole context at once."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._room: Tensor | None = None

    def extend(self, new: Tensor) -> Tensor:
        """Keep those of the newest tokens, [..., T, K]; returns all so far, [..., U, K]."""
        stop = self._cache.tokens
        start = stop - new.shape[-2]
        if start == 0:
            self._room = new.new_empty(*new.shape[:-2], self._cache.context, new.shape[-1])
        self._room[..., start:stop, :] = new
        return self._room[..., :stop, :]

    @property
    def bytes_per_token(self) -> int:
        return 0 if self._room is None else self._room[:1, ..., 0, :].nbytes


class CountingPositions(nn.Module):
    """Positions that go on from those of the tokens before."""

    def __init__(self, positions: Positions, cache: Cache) -> None:
        super().__init__()
        self.cache = cache

    def forward(self, ids_BT: Tensor) -> Tensor:
        stop = self.cache.tokens
        return torch.arange(stop - ids_BT.shape[1], stop, dtype=torch.float32, device=ids_BT.device)


class DenseKeysAndValues(nn.Module):
    """Keys, turned to their positions, and values: 2*C numbers a token."""

    def __init__(self, attention: Attention, cache: Cache) -> None:
        super().__init__()
        self.attention = attention
        self.keys, self.values = cache.past(), cache.past()

    def forward(self, x_BTC: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        q_BHTK, k_BHTK, v_BHTK = (part.transpose(1, 2) for part in self.attention.project(x_BTC, rotation))
        a_BHTK = attend(q_BHTK, self.keys.extend(k_BHTK), self.values.extend(v_BHTK))
        return self.attention.output(a_BHTK.transpose(1, 2).flatten(2))


class PackedKeysAndValues(nn.Module):
    """Keys and folded values of the N*H = G heads of a stack: N*C + N*H*D numbers a token."""

    def __init__(self, attention: PackedAttention, cache: Cache) -> None:
        super().__init__()
        self.attention = attention
        self.value_GDC, self.bias_ND = folded(attention)
        self.keys, self.values = cache.past(), cache.past()

    def forward(self, x_BTC: Tensor) -> Tensor:
        q_BGTK, k_BGTK = (part.transpose(1, 2) for part in self.attention.queries_and_keys(x_BTC))
        v_BGTD = F.linear(x_BTC, self.value_GDC.flatten(0, 1)).unflatten(-1, self.value_GDC.shape[:2]).transpose(1, 2)
        a_BGTD = attend(q_BGTK, self.keys.extend(k_BGTK), self.values.extend(v_BGTD))
        a_BTND = a_BGTD.transpose(1, 2).unflatten(2, (self.attention.layers, self.attention.heads)).sum(3)
        return a_BTND + self.attention.skip(x_BTC, self.bias_ND)


class ProjectedKeysAndValues(nn.Module):
    """Keys, as prepared, and values: of all N*H heads, or of the H that the layers of a stack share."""

    def __init__(self, attention: FoldedAttention | SharedAttention, cache: Cache) -> None:
        super().__init__()
        self.attention = remembering(attention, {Positions: CountingPositions}, cache)
        self.keys, self.values = cache.past(), cache.past()

    def forward(self, x_BTC: Tensor) -> Tensor:
        q_BGTK, k_BHTK, v_BHTD = (part.transpose(1, 2) for part in self.attention.project(x_BTC))
        k_BHUK, v_BHUD = self.keys.extend(k_BHTK), self.values.extend(v_BHTD)
        # queries of the same keys stand below each other, so that what is kept is not copied for each of them
        q_BHRK = q_BGTK.unflatten(1, (-1, k_BHUK.shape[1])).transpose(1, 2).flatten(2, 3)
        mask_RU = seen(q_BGTK.shape[2], k_BHUK.shape[2], x_BTC.device).repeat(q_BGTK.shape[1] // k_BHUK.shape[1], 1)
        a_BHRD = F.scaled_dot_product_attention(q_BHRK, k_BHUK, v_BHUD, attn_mask=mask_RU)
        a_BGTD = a_BHRD.unflatten(2, (-1, q_BGTK.shape[2])).transpose(1, 2).flatten(1, 2)
        return self.attention.combine(a_BGTD.transpose(1, 2), x_BTC)


class RememberedTokens(nn.Module):
    """The inputs that the next token's convolution reaches back to: a few, however many tokens there were."""

    def __init__(self, convolution: ShortConvolution, cache: Cache) -> None:
        super().__init__()
        self.convolution, self.cache = convolution, cache

    def forward(self, x_BTC: Tensor) -> Tensor:
        reach = self.convolution.reach
        if self.cache.tokens == x_BTC.shape[1]:
            self.before_BPC = x_BTC.new_zeros(len(x_BTC), reach, x_BTC.shape[2])
        x_BPC = torch.cat([self.before_BPC, x_BTC], dim=1)
        self.before_BPC = x_BPC[:, -reach:]
        return self.convolution.slide(x_BPC)


class PackedInputs(nn.Module):
    """The input of a stack alone, C numbers a token. All G = N*H heads attend to it as to one head's keys and values."""

    def __init__(self, attention: PackedAttention, cache: Cache) -> None:
        super().__init__()
        self.attention, self.cache = attention, cache
        self.key_GKC = attention.key.weight.detach().flatten(0, 1).unflatten(0, (attention.layers * attention.heads, -1))
        self.value_GDC, self.bias_ND = folded(attention)
        self.inputs = cache.past()

    def forward(self, x_BTC: Tensor) -> Tensor:
        x_BUC = self.inputs.extend(x_BTC)
        if x_BUC.shape == x_BTC.shape:  # nothing came before: the keys and values of all are used here and now
            return self.attention(x_BTC)
        q_BTGK = self.attention.query.shared(x_BTC).flatten(2).unflatten(2, self.key_GKC.shape[:2])
        q_BTGC = torch.einsum("btgk,gkc->btgc", q_BTGK, self.key_GKC) * self.key_GKC.shape[1] ** -0.5
        scores_BTGU = (q_BTGC.flatten(1, 2) @ x_BUC.mT).unflatten(1, q_BTGC.shape[1:3])
        later_T1U = ~seen(*x_BTC.shape[1:2], *x_BUC.shape[1:2], x_BTC.device)[:, None]
        weights_BTGU = scores_BTGU.masked_fill(later_T1U, -torch.inf).softmax(dim=-1)
        a_BTGC = (weights_BTGU.flatten(1, 2) @ x_BUC).unflatten(1, q_BTGC.shape[1:3])
        heads = (self.attention.layers, self.attention.heads)
        a_BTND = torch.einsum("btnhc,nhdc->btnd", a_BTGC.unflatten(2, heads), self.value_GDC.unflatten(0, heads))
        return a_BTND + self.attention.skip(x_BTC, self.bias_ND)


Leaves = Mapping[type[nn.Module], Callable[[nn.Module, Cache], nn.Module]]

KEYS_AND_VALUES: Leaves = {
    Positions: CountingPositions,
    ShortConvolution: RememberedTokens,
    Attention: DenseKeysAndValues,
    FoldedValues: PackedKeysAndValues,
    FoldedOutputs: PackedKeysAndValues,
    FoldedAttention: ProjectedKeysAndValues,
    SharedAttention: ProjectedKeysAndValues,
}
INPUTS: Leaves = {
    Positions: CountingPositions,
    ShortConvolution: RememberedTokens,
    FoldedValues: PackedInputs,
    FoldedOutputs: PackedInputs,
}


class Decoder:
    """A model that reads the tokens of a batch of windows piece by piece, each token once."""

    def __init__(self, model: nn.Module, context: int, leaves: Leaves = KEYS_AND_VALUES) -> None:
        """`leaves` says what is kept. Raises `ValueError` for a model in training mode, or one of which that is not enough."""
        if model.training:
            raise ValueError("the model is in training mode, where dropout changes its features; call its `eval` first")
        for module in model.modules():
            if type(module) in KEYS_AND_VALUES and type(module) not in leaves:
                raise ValueError(f"the inputs of {type(module).__name__} are not enough to decode: its keys know their positions")
        self.cache = Cache(context)
        self.head = model.head
        self._model = remembering(model, leaves, self.cache)

    def forget(self) -> None:
        """Begin anew, with windows of any number."""
        self.cache.tokens = 0

    @torch.no_grad()
    def features(self, ids_BT: Tensor) -> Tensor:
        """The features of the next tokens, [B, T, W], as those of the model for all tokens so far.

        Raises `ValueError` where that are more than the context.
        """
        tokens = self.cache.tokens + ids_BT.shape[1]
        if tokens > self.cache.context:
            raise ValueError(f"{tokens} tokens are more than the model's context of {self.cache.context}; forget the earliest")
        self.cache.tokens = tokens
        return self._model.features(ids_BT)


def remembering(module: nn.Module, leaves: Leaves, cache: Cache) -> nn.Module:
    """The same tree of modules with the same parameters, but for the leaves."""
    if type(module) in leaves:
        return leaves[type(module)](module, cache)
    twin = copy.copy(module)
    twin._modules = {name: remembering(child, leaves, cache) for name, child in module._modules.items()}
    return twin


def attend(q_BHTK: Tensor, k_BHUK: Tensor, v_BHUD: Tensor) -> Tensor:
    """Attention of the newest T of U positions to those up to each one's own, [B, H, T, D]."""
    mask_TU = seen(q_BHTK.shape[2], k_BHUK.shape[2], q_BHTK.device)
    return F.scaled_dot_product_attention(q_BHTK, k_BHUK, v_BHUD, attn_mask=mask_TU)


def seen(new: int, all_: int, device: torch.device) -> Tensor:
    """Which of all positions the newest ones may see, bool [T, U]."""
    return torch.ones(new, all_, dtype=torch.bool, device=device).tril(all_ - new)


@torch.no_grad()
def folded(attention: PackedAttention) -> tuple[Tensor, Tensor]:
    """The way of a token's input through values, outputs and reduction, [N*H, D, C], and what all biases add, [N, D]."""
    down_NHDK = attention.fold_outputs()
    value_NHKC = attention.value.weight.unflatten(1, (attention.heads, -1))
    return (down_NHDK @ value_NHKC).flatten(0, 1), attention.fold_biases(down_NHDK)
