"""Layers of the decoders.

Dimension letters: B batch, T time, C inputs, E outputs, N parallel layers, K head dim, V vocabulary.
Weights are initialised from a normal distribution, by default with the standard deviation that preserves the input's variance.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stacklm.model.kernels import project, rms_norm, squared_relu

EMBEDDING_STD = 0.02
SLOWEST = 10_000.0
"""Base of position encodings: wavelengths grow geometrically from 2 pi to this multiple of 2 pi."""


def normal_parameter(*shape: int, std: float) -> nn.Parameter:
    """A normally distributed parameter of that shape, from the global generator of torch's current device."""
    weight = torch.empty(shape)
    if not weight.is_meta:  # on the meta device `normal_` does nothing and costs two seconds of imports
        weight.normal_(std=std)
    return nn.Parameter(weight)


class Embedding(nn.Module):
    """One row of `weight` [V, C] per token."""

    def __init__(self, vocab_size: int, width: int) -> None:
        super().__init__()
        self.weight = normal_parameter(vocab_size, width, std=EMBEDDING_STD)

    def forward(self, ids_BT: Tensor) -> Tensor:
        return F.embedding(ids_BT, self.weight)


class RMSNorm(nn.RMSNorm):
    """Root mean square normalisation (arXiv:1910.07467) in the dtype of its input, whatever the dtype of its gain."""

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight.to(x.dtype), self.eps)


class Linear(nn.Module):
    """`weight` [E, C], and `bias` [E], initialised to zero, or None."""

    def __init__(self, inputs: int, outputs: int, bias: bool = False, std: float | None = None) -> None:
        super().__init__()
        self.weight = normal_parameter(outputs, inputs, std=inputs**-0.5 if std is None else std)
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def flops_per_token(self, attended: float) -> float:
        return 2 * self.weight.numel()


class Head(Linear):
    """Features to logits. Initial logits are of size 1 / sqrt(width), so the first loss is close to ln V."""

    def __init__(self, width: int, vocab_size: int, bias: bool = False) -> None:
        super().__init__(width, vocab_size, bias, std=1 / width)


class LanguageModel(nn.Module):
    """The model interface used by loss, decoding, audit and trainer: ids [B, T] to logits [B, T, V], in one step or two.

    To avoid materialising the logits of all tokens at once, `features` and `head` are called separately. With
    `activation_checkpointing` the backward pass recomputes activations.
    """

    head: Head
    activation_checkpointing: bool = False
    prefix: str = ""
    """A prefix of the parameter names in the module, left out where they are shown or saved."""

    def features(self, ids_BT: Tensor) -> Tensor:
        """The input of the head. Raises `ValueError` for a sequence longer than the context."""
        raise NotImplementedError

    def forward(self, ids_BT: Tensor) -> Tensor:
        return self.head(self.features(ids_BT))


class PackedLinear(nn.Module):
    """N parallel linear maps: `weight` [N, E, C], and `bias` [N, E] or None."""

    def __init__(self, layers: int, inputs: int, outputs: int, bias: bool = False, std: float | None = None) -> None:
        super().__init__()
        self.weight = normal_parameter(layers, outputs, inputs, std=inputs**-0.5 if std is None else std)
        self.bias = nn.Parameter(torch.zeros(layers, outputs)) if bias else None

    def forward(self, x_BTNC: Tensor) -> Tensor:
        """Each map on its own input: [B, T, N, C] to [B, T, N, E]."""
        y_BTNE = torch.einsum("btnc,nec->btne", x_BTNC, self.weight)
        return y_BTNE if self.bias is None else y_BTNE + self.bias

    def shared(self, x_BTC: Tensor) -> Tensor:
        """All maps on the same input, as one matrix product: [B, T, C] to [B, T, N, E]."""
        bias = None if self.bias is None else self.bias.flatten()
        return project(x_BTC, self.weight.flatten(0, 1), bias).unflatten(-1, self.weight.shape[:2])

    def flops_per_token(self, attended: float) -> float:
        return 2 * self.weight.numel()


class PackedLayerNorm(nn.Module):
    """N parallel LayerNorms over C features each: `weight` and `bias` [N, C]."""

    def __init__(self, layers: int, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(layers, features))
        self.bias = nn.Parameter(torch.zeros(layers, features))

    def forward(self, x_BTNC: Tensor) -> Tensor:
        return F.layer_norm(x_BTNC, x_BTNC.shape[-1:]) * self.weight + self.bias


class SquaredReLU(nn.Module):
    """`down(relu(up(x))^2)` (arXiv:2109.08668)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = Linear(width, hidden)
        self.down = Linear(hidden, width, std=0)

    def forward(self, x_BTC: Tensor) -> Tensor:
        return self.down(squared_relu(self.up(x_BTC)))


class SwiGLU(nn.Module):
    """`down(silu(gate(x)) * up(x))` (arXiv:2002.05202)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate = Linear(width, hidden)
        self.up = Linear(width, hidden)
        self.down = Linear(hidden, width, std=0)

    def forward(self, x_BTC: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x_BTC)) * self.up(x_BTC))


FEED_FORWARDS = {"relu2": SquaredReLU, "swiglu": SwiGLU}


class ShortConv(nn.Module):
    """x_t + sum_i w_i x_{t-i}, channel by channel, over the `reach` tokens before each: `weight` [reach, C].

    Initially the identity. A reach of 1 is a token shift (as in RWKV, arXiv:2305.13048), a reach of 3 a convolution of width 4
    (Canon layers, arXiv:2512.17351).
    """

    def __init__(self, width: int, reach: int) -> None:
        super().__init__()
        self.reach = reach
        self.weight = nn.Parameter(torch.zeros(reach, width))

    def forward(self, x_BTC: Tensor) -> Tensor:
        return self.slide(F.pad(x_BTC, (0, 0, self.reach, 0)))

    def slide(self, x_padded: Tensor) -> Tensor:
        """The convolution of tokens preceded by `reach` others: [B, reach + T, C] to [B, T, C]."""
        length = x_padded.shape[1] - self.reach
        taps = (x_padded[:, self.reach - i : self.reach - i + length] * w_C for i, w_C in enumerate(self.weight, start=1))
        return x_padded[:, self.reach :] + sum(taps)


class DenseSkip(nn.Module):
    """The latest output plus the first few of the earlier ones, each scaled by a gain per channel: `weight` [sources, C].

    The gains start at zero. With all earlier outputs it is a variant of DenseFormer (Pagliardini et al. 2024, arXiv:2402.02622).
    """

    def __init__(self, sources: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(sources, width))

    def forward(self, outputs: Sequence[Tensor]) -> Tensor:
        return outputs[-1] + sum(gain_C * x_BTC for gain_C, x_BTC in zip(self.weight, outputs, strict=False))


class DynamicSkip(nn.Module):
    """The latest output plus all earlier ones, each scaled by a weight per token that is computed from the latest output.

    After the dynamic dense connections of MUDDFormer (Xiao et al. 2025, arXiv:2502.12170), with one weight per earlier output. The
    weights start at zero. Narrower outputs are zero-padded to the width of a wider one.
    """

    def __init__(self, sources: int, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.weights = Linear(width, sources, bias=True, std=0)

    def forward(self, outputs: Sequence[Tensor]) -> Tensor:
        *earlier, x_BTC = outputs
        weights = self.weights(self.norm(x_BTC)).unsqueeze(-1).unbind(2)  # [B, T, 1] each
        wide = (F.pad(y, (0, x_BTC.shape[-1] - y.shape[-1])) for y in earlier)
        return x_BTC + sum(w_BT1 * y_BTC for w_BT1, y_BTC in zip(weights, wide, strict=True))


class Positions(nn.Module):
    """The positions of a sequence's tokens: 0 to T-1, float32 [T]. In a decoder with a cache, `CountingPositions` replaces it.

    The sequence is any tensor [B, T, ...]: ids, features, queries. Raises `ValueError` for more tokens than `context`.
    """

    def __init__(self, context: int) -> None:
        super().__init__()
        self.context = context

    def forward(self, sequence: Tensor) -> Tensor:
        length = sequence.shape[1]
        if length > self.context:
            raise ValueError(f"a sequence of {length} tokens is longer than the model's context of {self.context}; cut it")
        return torch.arange(length, dtype=torch.float32, device=sequence.device)


def sinusoids(positions_T: Tensor, width: int) -> Tensor:
    """Sine and cosine of each wavelength, interleaved, [T, C] (Vaswani et al. 2017, arXiv:1706.03762, section 3.5)."""
    angles = _angles(positions_T, (width + 1) // 2)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :width]


Rotation = tuple[Tensor, Tensor]
"""Cosine and sine of the angles of rotary positions, [T, 1, K/2] each."""


def rotations(positions_T: Tensor, dim: int) -> Rotation:
    """The rotation angle of each of the `dim` / 2 planes at each position, as cosine and sine (RoFormer, arXiv:2104.09864)."""
    angles = _angles(positions_T, dim // 2)[:, None]
    return angles.cos(), angles.sin()


def _angles(positions_T: Tensor, planes: int) -> Tensor:
    plane = torch.arange(planes, dtype=torch.float32, device=positions_T.device)
    return torch.outer(positions_T, SLOWEST ** (-plane / planes))
