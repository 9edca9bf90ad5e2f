"""Faults to plant in real models and in their training, and models without faults."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stacklm.audit.data import Machinery
from stacklm.config.model import Dense, Stack, Stacked
from stacklm.config.train import Train
from stacklm.data.batches import TrainBatches, evaluation_batches
from stacklm.model.build import ModelConfig, build
from stacklm.model.dense import Attention
from stacklm.model.kernels import causal_attention
from stacklm.model.layers import RMSNorm
from stacklm.model.stacked import PublishedAttention
from stacklm.train.loss import Objective
from stacklm.train.validate import Score, score

VOCAB, CONTEXT = 30, 10
ARCHITECTURES = {
    "dense": Dense(d_model=16, n_heads=2, n_layers=2, d_ff=32),
    "stacked": Stacked(d_model=16, n_heads=2, stacks=(Stack(4, 4, 16), Stack(4, 8, 16)), dropout=0.2),
}
ATTENTION = {"dense": "blocks.0.attention", "stacked": "stacks.0.attention"}


TRAIN = Train(max_steps=2, warmup_steps=1, context_length=CONTEXT, global_batch_size=4, micro_batch_size=2, device="cpu", threads=1)


def config(kind: str) -> ModelConfig:
    return ModelConfig(ARCHITECTURES[kind], VOCAB, CONTEXT)


def made(kind: str, plant: Callable[[nn.Module], None] = lambda model: None, context: int = CONTEXT) -> nn.Module:
    torch.manual_seed(0)
    model = build(ARCHITECTURES[kind], VOCAB, context)
    plant(model)
    return model


def builder(plant: Callable[[nn.Module], None]) -> Callable[..., nn.Module]:
    """A version of `build` that plants the fault in the model."""

    def planted(*arguments: object) -> nn.Module:
        model = build(*arguments)
        plant(model)
        return model

    return planted


class Around(nn.Module):
    """Wraps an attention module."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.inner = attention


class Backwards(Around):
    """Attention with its mask reversed in time."""

    def forward(self, x_BTC: Tensor, *rest: object) -> Tensor:
        return self.inner(x_BTC.flip(1), *rest).flip(1)


class ForgetsItsMask(Around):
    """Attention without a mask in one of the modes."""

    def __init__(self, attention: nn.Module, in_training: bool) -> None:
        super().__init__(attention)
        self.in_training = in_training

    def forward(self, x_BTC: Tensor, *rest: object) -> Tensor:
        forth = self.inner(x_BTC, *rest)
        return forth + self.inner(x_BTC.flip(1), *rest).flip(1) if self.training is self.in_training else forth


class OffByOne(nn.Module):
    """A convolution over 3 tokens with one of its two padding zeros after the sequence."""

    def forward(self, x_BTC: Tensor) -> Tensor:
        return F.pad(x_BTC, (0, 0, 1, 1)).unfold(1, 3, 1).sum(dim=-1)


class NormOverTime(nn.Module):
    def forward(self, x_BTC: Tensor) -> Tensor:
        return F.layer_norm(x_BTC.mT, x_BTC.shape[1:2]).mT


class Echo(nn.Module):
    """Every sequence of a batch depends on the others."""

    def forward(self, x_BTC: Tensor) -> Tensor:
        return x_BTC + 0.1 * x_BTC.mean(dim=0)


class Counted(nn.Module):
    """Depends on the length of the sequence."""

    def forward(self, x_BTC: Tensor) -> Tensor:
        return x_BTC * x_BTC.shape[1]


class Ahead(nn.Module):
    """Adds a `share` of the next position at some `positions` of some `rows`, if `when` is true."""

    def __init__(
        self,
        share: float = 1.0,
        positions: Callable[[Tensor], Tensor] = lambda position_T: position_T >= 0,
        rows: slice = slice(None),
        when: Callable[[nn.Module], bool] = lambda module: True,
    ) -> None:
        super().__init__()
        self.share, self.positions, self.rows, self.when = share, positions, rows, when

    def forward(self, x_BTC: Tensor) -> Tensor:
        if not self.when(self):
            return x_BTC
        later_BTC = torch.zeros_like(x_BTC)
        later_BTC[self.rows, :-1] = x_BTC[self.rows, 1:]
        return x_BTC + self.share * later_BTC * self.positions(torch.arange(x_BTC.shape[1]))[:, None]


class Gated(nn.Module):
    """Looks ahead through a gate that is closed until training opens it, in a parameter that is not all zero."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = RMSNorm(2)
        self.norm.weight.data[1] = 0.0

    def forward(self, x_BTC: Tensor) -> Tensor:
        here, ahead = self.norm.weight
        return here * x_BTC + ahead * (Ahead()(x_BTC) - x_BTC)


class Remembers(nn.Module):
    """Keeps state from the previous batch, in one of the modes."""

    before: Tensor | float = 0.0

    def __init__(self, in_training: bool) -> None:
        super().__init__()
        self.in_training = in_training

    def forward(self, x_BTC: Tensor) -> Tensor:
        if self.training is not self.in_training:
            return x_BTC
        before, self.before = self.before, x_BTC.detach().mean()
        return x_BTC + 0.1 * before


class Hears(nn.Module):
    """One row of a batch contains a small share of another one."""

    def __init__(self, row: int, other: int) -> None:
        super().__init__()
        self.row, self.other = row, other

    def forward(self, x_BTC: Tensor) -> Tensor:
        heard_BTC = torch.zeros_like(x_BTC)
        if len(x_BTC) > max(self.row, self.other):
            heard_BTC[self.row] = 1e-3 * x_BTC[self.other]
        return x_BTC + heard_BTC


class OneHeadUnmasked(Around):
    """Attention whose last head has no mask; with packed layers, the last head of the last layer."""

    def forward(self, x_BTC: Tensor, *rotation: object) -> Tensor:
        dense = isinstance(self.inner, Attention)
        if not dense and not isinstance(self.inner, PublishedAttention):  # a cache for decoding is in its place
            return self.inner(x_BTC, *rotation)
        fold = () if dense else (self.inner.fold(),)
        q_BTHK, k_BTHK, v_BTHD = self.inner.project(x_BTC, *rotation, *fold)
        q_BTK, k_BTK, v_BTD = (part[:, :, -1] for part in (q_BTHK, k_BTHK, v_BTHD))
        last_BTD = F.scaled_dot_product_attention(q_BTK, k_BTK, v_BTD)
        a_BTHD = torch.cat([causal_attention(q_BTHK, k_BTHK, v_BTHD)[:, :, :-1], last_BTD[:, :, None]], dim=2)
        return self.inner.output(a_BTHD.flatten(2)) if dense else self.inner.combine(a_BTHD, x_BTC, *fold)


class OnlyItself(Around):
    """Replaces attention: every position sees only itself."""

    def forward(self, x_BTC: Tensor, *rest: object) -> Tensor:
        given = [rotation for rotation in rest if rotation is not None]
        places = [tuple(tuple(part[t : t + 1] for part in rotation) for rotation in given) for t in range(x_BTC.shape[1])]
        return torch.cat([self.inner(x_BTC[:, t : t + 1], *place) for t, place in enumerate(places)], dim=1)


def attentions(wrap: Callable[[nn.Module], nn.Module], which: slice = slice(None)) -> Callable[[nn.Module], None]:
    """A function that wraps all attention modules of a model, or some of them."""

    def plant(model: nn.Module) -> None:
        for part in [module for module in model.modules() if hasattr(module, "attention")][which]:
            part.attention = wrap(part.attention)

    return plant


EMBEDDING = "embedding_norm"
LAST_BLOCK = "blocks.1.feed_forward_norm"
"""A module of a dense decoder in the part that is compiled or recomputed."""


def behind(name: str, module: Callable[[], nn.Module]) -> Callable[[nn.Module], None]:
    """A function that plants a module after the named module of a model."""

    def plant(model: nn.Module) -> None:
        model.set_submodule(name, nn.Sequential(model.get_submodule(name), module()))

    return plant


class Copies(TrainBatches):
    """Targets that are not shifted: they are the inputs."""

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        inputs_BT, _ = super().batch(step)
        return inputs_BT, inputs_BT


class Overlapping(TrainBatches):
    """Overlapping sequences, one starting every half sequence."""

    def __init__(self, stream, context: int, batch_size: int, seed: int) -> None:
        super().__init__(stream, context, batch_size, seed)
        self.sequences = 2 * self.sequences - 2

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        starts = [1 + sequence * self.context // 2 for sequence in self.indices(step)]
        rows = torch.tensor([self.stream[start - 1 : start + self.context].tolist() for start in starts])
        return rows[:, :-1], rows[:, 1:]


class Repeating(TrainBatches):
    """Always the first batch."""

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        return super().batch(0)


class ShiftedTwice(Objective):
    """Shifts targets that are already shifted."""

    def forward(self, inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        return super().forward(inputs_BT[:, :-1], targets_BT[:, 1:])


def shifted_evaluation(*arguments: object) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    for inputs_BT, _, mask_BT in evaluation_batches(*arguments):
        yield inputs_BT, inputs_BT, mask_BT


def unmasked(*arguments: object) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Evaluation batches whose mask includes the padding."""
    for inputs_BT, targets_BT, mask_BT in evaluation_batches(*arguments):
        yield inputs_BT, targets_BT, torch.ones_like(mask_BT)


def careless_score(model: nn.Module, batches: Iterator, token_bytes_V: object) -> Score:
    """A score that includes padding as text, but reports the right number of tokens."""
    kept = list(batches)
    result = score(model, [(inputs, targets, torch.ones_like(mask)) for inputs, targets, mask in kept], token_bytes_V)
    return replace(result, tokens=int(sum(mask.sum() for _, _, mask in kept)))


MODEL_FAULTS = {
    "upper-triangular mask": attentions(Backwards),
    "mask missing in evaluation mode": attentions(lambda attention: ForgetsItsMask(attention, in_training=False)),
    "mask missing in training mode": attentions(lambda attention: ForgetsItsMask(attention, in_training=True)),
    "convolution padded off by one": behind(EMBEDDING, OffByOne),
    "normalisation over time": behind(EMBEDDING, NormOverTime),
}
LONG = 48
"""A context longer than the sequences in which every pair of positions is tested."""
BORDERS = 16
"""Size of blocks that leak only at their borders."""


def where_checkpointed(model: nn.Module) -> None:
    behind(LAST_BLOCK, lambda: Ahead(when=lambda module: model.activation_checkpointing))(model)


def hidden(plant: Callable[[nn.Module], None], named: str, kind: str = "dense", **settings: object) -> tuple:
    """A fault of a model that is trained with these settings, and the start of the message about it."""
    return kind, plant, settings, named


AS_TRAINED = "context of weights in the form that is trained: a leak in a sequence of 48: "
HIDDEN_FAULTS = {
    "one head of one layer without mask": hidden(
        attentions(OneHeadUnmasked, slice(-1, None)),
        "pairs of weights: no mask, or a normalisation over time: every position sees all later tokens; in both modes; the first "
        "module to let them in is `stacks.1.attention` (OneHeadUnmasked)",
        kind="stacked",
    ),
    "one head of one block without mask": hidden(attentions(OneHeadUnmasked, slice(-1, None)), "pairs of weights: no mask, "),
    "a thousandth of the next token": hidden(behind(EMBEDDING, lambda: Ahead(1e-3)), "pairs of weights: off by 1: "),
    "only while gradients are recorded": hidden(
        behind(EMBEDDING, lambda: Ahead(when=lambda module: torch.is_grad_enabled())),
        "modes of weights: training and evaluation mode differ",
    ),
    "only late, in training mode": hidden(
        behind(EMBEDDING, lambda: Ahead(1e-3, lambda position_T: position_T > 44, when=lambda module: module.training)),
        "modes of weights: training and evaluation mode differ at positions 45, 46",
    ),
    "only at borders of blocks": hidden(
        behind(EMBEDDING, lambda: Ahead(1e-3, lambda position_T: (position_T % BORDERS == BORDERS - 1) & (position_T > 16))),
        "context of weights: a leak in a sequence of 48: in evaluation mode features at position 31 change with the tokens from 32",
    ),
    "only in the second row, late": hidden(
        behind(EMBEDDING, lambda: Ahead(1e-3, lambda position_T: position_T > 32, rows=slice(1, 2))),
        "context of weights: a leak in a sequence of 48: ",
    ),
    "from the first row into the second": hidden(
        behind(EMBEDDING, lambda: Hears(1, 0)),
        "rows of weights: batch rows mix: in evaluation mode row 1 of 16 changes",
    ),
    "of the batch before, in training mode": hidden(
        behind(EMBEDDING, lambda: Remembers(in_training=True)),
        "repeats of weights: state between calls: in training mode the same input has other features at positions 0, 1",
    ),
    "of the batch before, in evaluation mode": hidden(
        behind(EMBEDDING, lambda: Remembers(in_training=False)),
        "repeats of weights: state between calls: in evaluation mode the same input has other features at positions 0, 1",
    ),
    "only in bfloat16": hidden(
        behind(EMBEDDING, lambda: Ahead(when=lambda module: torch.is_autocast_enabled("cpu"))),
        f"{AS_TRAINED}in training mode features at position",
        precision="bf16",
    ),
    "only in bfloat16, at one late position": hidden(
        behind(EMBEDDING, lambda: Ahead(1.0, lambda position_T: position_T == 37, when=lambda _: torch.is_autocast_enabled("cpu"))),
        f"{AS_TRAINED}in training mode features at position 37 change with the tokens from 38",
        kind="stacked",
        precision="bf16",
    ),
    "only with activation checkpointing": hidden(
        where_checkpointed, f"{AS_TRAINED}in training mode features at position", activation_checkpointing="full"
    ),
    "only compiled": hidden(
        behind(LAST_BLOCK, lambda: Ahead(when=lambda module: torch.compiler.is_compiling())),
        f"{AS_TRAINED}in training mode features at position",
        compile=True,
        micro_batch_size=4,
    ),
}
DATA_FAULTS = {
    "shifted labels": Machinery(train_batches=Copies),
    "sequences overlap": Machinery(train_batches=Overlapping),
    "padding inside the loss": Machinery(evaluation_batches=unmasked),
}
