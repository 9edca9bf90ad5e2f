"""Faults to plant into real models and into the way they are trained, and models without any."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stacklm.audit.data import Machinery
from stacklm.config.model import Dense, Stack, Stacked
from stacklm.data.batches import TrainBatches, evaluation_batches
from stacklm.model.build import ModelConfig, build
from stacklm.train.loss import Objective
from stacklm.train.validate import Score, score

VOCAB, CONTEXT = 30, 10
ARCHITECTURES = {
    "dense": Dense(width=16, heads=2, layers=2, hidden=32),
    "stacked": Stacked(width=16, heads=2, stacks=(Stack(4, 4, 16), Stack(4, 8, 16)), dropout=0.2),
}
ATTENTION = {"dense": "blocks.0.attention", "stacked": "stacks.0.layers.attention"}


def config(kind: str) -> ModelConfig:
    return ModelConfig(ARCHITECTURES[kind], VOCAB, CONTEXT)


def made(kind: str, plant: Callable[[nn.Module], None] = lambda model: None) -> nn.Module:
    torch.manual_seed(0)
    model = build(ARCHITECTURES[kind], VOCAB, CONTEXT)
    plant(model)
    return model


def builder(plant: Callable[[nn.Module], None]) -> Callable[..., nn.Module]:
    """`build`, with the fault in what it builds."""

    def planted(*arguments: object) -> nn.Module:
        model = build(*arguments)
        plant(model)
        return model

    return planted


class Backwards(nn.Module):
    """Attention with its mask the wrong way round: what it does in time, it does in reversed time."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.inner = attention

    def forward(self, x_BTC: Tensor, *rest: object) -> Tensor:
        return self.inner(x_BTC.flip(1), *rest).flip(1)


class ForgetsItsMask(nn.Module):
    """Attention that looks both ways in one of the modes."""

    def __init__(self, attention: nn.Module, in_training: bool) -> None:
        super().__init__()
        self.inner, self.in_training = attention, in_training

    def forward(self, x_BTC: Tensor, *rest: object) -> Tensor:
        forth = self.inner(x_BTC, *rest)
        return forth + self.inner(x_BTC.flip(1), *rest).flip(1) if self.training is self.in_training else forth


class OffByOne(nn.Module):
    """A convolution over 3 tokens with one of its two zeros behind the window."""

    def forward(self, x_BTC: Tensor) -> Tensor:
        return F.pad(x_BTC, (0, 0, 1, 1)).unfold(1, 3, 1).sum(dim=-1)


class NormOverTime(nn.Module):
    def forward(self, x_BTC: Tensor) -> Tensor:
        return F.layer_norm(x_BTC.mT, x_BTC.shape[1:2]).mT


class Echo(nn.Module):
    """Every window of a batch hears the others."""

    def forward(self, x_BTC: Tensor) -> Tensor:
        return x_BTC + 0.1 * x_BTC.mean(dim=0)


class Counted(nn.Module):
    """Knows how long the window is."""

    def forward(self, x_BTC: Tensor) -> Tensor:
        return x_BTC * x_BTC.shape[1]


class OnlyItself(nn.Module):
    """Instead of attention: every position sees but itself."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.inner = attention

    def forward(self, x_BTC: Tensor, *rest: object) -> Tensor:
        places = [tuple(tuple(part[t : t + 1] for part in rotation) for rotation in rest) for t in range(x_BTC.shape[1])]
        return torch.cat([self.inner(x_BTC[:, t : t + 1], *place) for t, place in enumerate(places)], dim=1)


def attentions(wrap: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module], None]:
    """Plants in place of every attention."""

    def plant(model: nn.Module) -> None:
        for part in [module for module in model.modules() if hasattr(module, "attention")]:
            part.attention = wrap(part.attention)

    return plant


def behind_the_embedding(module: Callable[[], nn.Module]) -> Callable[[nn.Module], None]:
    def plant(model: nn.Module) -> None:
        model.embedding_norm = nn.Sequential(model.embedding_norm, module())

    return plant


class Copies(TrainBatches):
    """Labels shifted by nothing: the targets are the inputs."""

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        inputs_BT, _ = super().batch(step)
        return inputs_BT, inputs_BT


class Overlapping(TrainBatches):
    """Windows that begin every half window."""

    def __init__(self, stream, context: int, batch_size: int, seed: int) -> None:
        super().__init__(stream, context, batch_size, seed)
        self.windows = 2 * self.windows - 2

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        starts = [1 + window * self.context // 2 for window in self.indices(step)]
        rows = torch.tensor([self.stream[start - 1 : start + self.context].tolist() for start in starts])
        return rows[:, :-1], rows[:, 1:]


class Repeating(TrainBatches):
    """Always the first batch."""

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        return super().batch(0)


class ShiftedTwice(Objective):
    """Shifts labels which are shifted already."""

    def forward(self, inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        return super().forward(inputs_BT[:, :-1], targets_BT[:, 1:])


def shifted_evaluation(*arguments: object) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    for inputs_BT, _, mask_BT in evaluation_batches(*arguments):
        yield inputs_BT, inputs_BT, mask_BT


def unmasked(*arguments: object) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Batches whose padding counts."""
    for inputs_BT, targets_BT, mask_BT in evaluation_batches(*arguments):
        yield inputs_BT, targets_BT, torch.ones_like(mask_BT)


def careless_score(model: nn.Module, batches: Iterator, token_bytes_V: object) -> Score:
    """A score that takes padding for text, and counts the right number of tokens."""
    kept = list(batches)
    result = score(model, [(inputs, targets, torch.ones_like(mask)) for inputs, targets, mask in kept], token_bytes_V)
    return replace(result, tokens=int(sum(mask.sum() for _, _, mask in kept)))


MODEL_FAULTS = {
    "upper-triangular mask": attentions(Backwards),
    "mask missing in evaluation mode": attentions(lambda attention: ForgetsItsMask(attention, in_training=False)),
    "mask missing in training mode": attentions(lambda attention: ForgetsItsMask(attention, in_training=True)),
    "convolution padded off by one": behind_the_embedding(OffByOne),
    "normalisation over time": behind_the_embedding(NormOverTime),
}
DATA_FAULTS = {
    "shifted labels": Machinery(train_batches=Copies),
    "windows overlap": Machinery(train_batches=Overlapping),
    "padding inside the loss": Machinery(evaluation_batches=unmasked),
}
