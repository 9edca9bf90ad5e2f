"""Ideas for the best stacked form, one class each: `Best` is `stacked` of params.yaml, and every other class changes one thing.

Run by `stacklm lab run ideas`. What turns out better moves into `stacklm/model/stacked.py`; what does not stays here, with its
verdict in docs/LOG.md. Each addition starts as nothing, so that all models begin as `Best` does.

Dimension letters: B batch, T time, C width of the stream, N parallel layers, D features of each, H heads of all layers, K dim of
queries and keys.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stacklm.config.model import FactoredAttention, Stack, Stacked
from stacklm.model.kernels import causal_attention
from stacklm.model.layers import Embedding, Linear, Rotation, ShortConv, rotations
from stacklm.model.stacked import ParallelStack, StackedDecoder


class BestStack(ParallelStack):
    """One stack: attention of N layers, then one feed-forward network. `x0_BTC` is the embedding, for the ideas that read it."""

    def forward(self, x_BTC: Tensor, rotation: Rotation, x0_BTC: Tensor) -> Tensor:
        y_BTC = x_BTC + self.mix(self.attend(self.read(x_BTC), rotation, x0_BTC).flatten(2))
        return y_BTC + self.ffn(self.ffn_norm(y_BTC))

    def read(self, x_BTC: Tensor) -> Tensor:
        return self.conv(x_BTC if self.norm is None else self.norm(x_BTC))

    def attend(self, y_BTC: Tensor, rotation: Rotation, x0_BTC: Tensor) -> Tensor:
        """r [B, T, N, D]."""
        return self.attention(y_BTC, rotation)


class Best(StackedDecoder):
    """ids [B, T] to logits [B, T, V]: `stacks` stacks of 4 layers of 24 features."""

    stack: type[BestStack] = BestStack

    def __init__(self, vocab_size: int, context_length: int, d_ff: int, stacks: int = 2) -> None:
        attention = FactoredAttention(rope=True, qk_norm=True)
        each = (Stack(4, 24, d_ff),) * stacks
        config = Stacked(96, 4, each, attention=attention, ffn="swiglu", residual=True, conv_size=4)
        super().__init__(config, vocab_size, context_length)
        self.stacks = nn.ModuleList(self.stack(config, one, stacks, first=s == 0) for s, one in enumerate(each))

    def features(self, ids_BT: Tensor) -> Tensor:
        rotation = rotations(self.positions(ids_BT), self.rotary_dim)
        outputs = [self.embed(ids_BT)]
        for s, stack in enumerate(self.stacks):
            outputs.append(stack(self.input_of(s, outputs), rotation, self.value_source(ids_BT, outputs[0])))
        return self.norm(self.input_of(len(self.stacks), outputs))

    def embed(self, ids_BT: Tensor) -> Tensor:
        return self.embedding_norm(self.embedding(ids_BT))

    def value_source(self, ids_BT: Tensor, x0_BTC: Tensor) -> Tensor:
        return x0_BTC

    def input_of(self, s: int, outputs: list[Tensor]) -> Tensor:
        """What stack s reads; for s = S, the final norm."""
        return outputs[-1]


class SourcedValuesStack(BestStack):
    """Values have a second part, linear in what the token is and not in what the stream says by now."""

    source = 96

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.sourced = Linear(self.source, self.attention.value.weight.shape[:2].numel(), std=0)

    def attend(self, y_BTC: Tensor, rotation: Rotation, x0_BTC: Tensor) -> Tensor:
        q_BTHK, k_BTHK, v_BTHD = self.attention.project(y_BTC, rotation)
        v_BTHD = v_BTHD + self.sourced(x0_BTC).view(v_BTHD.shape)
        return self.attention.combine(causal_attention(q_BTHK, k_BTHK, v_BTHD), y_BTC)


class SourcedValues(Best):
    """Values also read x_0 (after the value residuals of Zhou et al. 2024, arXiv:2410.17897)."""

    stack = SourcedValuesStack


class TableValuesStack(SourcedValuesStack):
    source = 32


class TableValues(Best):
    """Value embeddings (modded-nanogpt, nanochat), from one table of 32 numbers per token that all stacks share."""

    stack = TableValuesStack

    def __init__(self, vocab_size: int, context_length: int, d_ff: int) -> None:
        super().__init__(vocab_size, context_length, d_ff)
        self.table = Embedding(vocab_size, 32)
        nn.init.normal_(self.table.weight)

    def value_source(self, ids_BT: Tensor, x0_BTC: Tensor) -> Tensor:
        return self.table(ids_BT)


class Bigrams(Best):
    """An embedding of the last two tokens, hashed to 4,096 rows of 24 numbers (the idea of Engram, and of modded-nanogpt)."""

    ROWS, WIDTH = 4096, 24

    def __init__(self, vocab_size: int, context_length: int, d_ff: int) -> None:
        super().__init__(vocab_size, context_length, d_ff)
        self.table = Embedding(self.ROWS, self.WIDTH)
        nn.init.normal_(self.table.weight)
        self.widen = Linear(self.WIDTH, 96, std=0)

    def embed(self, ids_BT: Tensor) -> Tensor:
        before_BT = nn.functional.pad(ids_BT, (1, 0))[:, :-1]
        rows_BT = (ids_BT * 36_313 + before_BT * 27_191) % self.ROWS
        return super().embed(ids_BT) + self.widen(self.table(rows_BT))


class MoreConvolutionsStack(BestStack):
    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.features_conv, self.ffn_conv = ShortConv(96, 3), ShortConv(96, 3)

    def forward(self, x_BTC: Tensor, rotation: Rotation, x0_BTC: Tensor) -> Tensor:
        r_BTW = self.features_conv(self.attend(self.read(x_BTC), rotation, x0_BTC).flatten(2))
        y_BTC = x_BTC + self.mix(r_BTW)
        return y_BTC + self.ffn(self.ffn_conv(self.ffn_norm(y_BTC)))


class MoreConvolutions(Best):
    """Convolutions of width 4 behind the attention and before the feed-forward network as well (Canon, arXiv:2512.17351)."""

    stack = MoreConvolutionsStack


class LanesStack(BestStack):
    def forward(self, x_BTC: Tensor, rotation: Rotation, x0_BTC: Tensor) -> Tensor:
        y_BTC = self.read(x_BTC)
        return x_BTC + self.mix(self.attend(y_BTC, rotation, x0_BTC).flatten(2)) + self.ffn(self.ffn_norm(x_BTC))


class Lanes(Best):
    """Attention and feed-forward network read the same input: a stack is one serial step in place of two (after GPT-J)."""

    stack = LanesStack


class BranchConvolutionsStack(BestStack):
    """Each of the N layers reads the input through a convolution of its own, which is no linear map of the one input token."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.branches, self.conv = nn.ModuleList(ShortConv(96, 3) for _ in range(4)), None

    def read(self, x_BTC: Tensor) -> Tensor:
        return x_BTC if self.norm is None else self.norm(x_BTC)

    def attend(self, y_BTC: Tensor, rotation: Rotation, x0_BTC: Tensor) -> Tensor:
        y_BTNC = torch.stack([branch(y_BTC) for branch in self.branches], dim=2)
        part = self.attention
        q_BTHK, k_BTHK, v_BTHD = (
            map_(y_BTNC).unflatten(3, (part.heads, -1)).flatten(2, 3) for map_ in (part.query, part.key, part.value)
        )
        q_BTHK, k_BTHK = part.transforms(q_BTHK, k_BTHK, rotation)
        a_BTHD = causal_attention(q_BTHK, k_BTHK, v_BTHD)
        return a_BTHD.unflatten(2, (-1, part.heads)).sum(3) + part.reduce(y_BTNC)


class BranchConvolutions(Best):
    """Parallel layers with inputs of their own."""

    stack = BranchConvolutionsStack


class GateStack(BestStack):
    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.gate = Linear(96, self.attention.layers * self.attention.heads, bias=True, std=0)

    def attend(self, y_BTC: Tensor, rotation: Rotation, x0_BTC: Tensor) -> Tensor:
        a_BTHD = causal_attention(*self.attention.project(y_BTC, rotation))
        return self.attention.combine(a_BTHD * (2 * self.gate(y_BTC).sigmoid())[..., None], y_BTC)


class Gate(Best):
    """A gate for each head behind its attention, from what its query reads (Qiu et al. 2025, arXiv:2505.06708)."""

    stack = GateStack


class DynamicReads(Best):
    """Every stack but the first, and the head, read all earlier outputs, weighted by the token (MUDD, arXiv:2502.12170)."""

    def __init__(self, vocab_size: int, context_length: int, d_ff: int) -> None:
        super().__init__(vocab_size, context_length, d_ff)
        self.norms = nn.ModuleList(nn.LayerNorm(96) for _ in self.stacks)
        self.weights = nn.ModuleList(Linear(96, s + 1, bias=True, std=0) for s in range(len(self.stacks)))

    def input_of(self, s: int, outputs: list[Tensor]) -> Tensor:
        if s == 0:
            return outputs[0]
        latest = outputs[-1]
        weights_BTS = self.weights[s - 1](self.norms[s - 1](latest))
        earlier = torch.stack(outputs[:-1], dim=-1)
        return latest + (earlier * weights_BTS[..., None, :]).sum(-1)
