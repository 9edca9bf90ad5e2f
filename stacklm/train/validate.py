"""Scoring a model on a stream of tokens: loss and bits per byte."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from stacklm.data.batches import evaluation_batches
from stacklm.data.shards import TokenStream
from stacklm.model.layers import LanguageModel
from stacklm.train.distributed import SINGLE, ProcessGroup
from stacklm.train.loss import token_losses

Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Batches = Iterable[Batch]


@dataclass(frozen=True)
class Score:
    """Sums over scored tokens: `nats` over all of them, `text_nats` over those with text, whose total length is `bytes`.

    Special tokens have no text: they count in the loss, but not in bits per byte or word perplexity.
    """

    tokens: int
    nats: float
    text_nats: float
    bytes: int

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def bits_per_byte(self) -> float:
        return self.text_nats / (math.log(2) * self.bytes)


def validate(
    model: LanguageModel,
    stream: TokenStream,
    token_bytes_V: np.ndarray,
    context: int,
    batch_size: int,
    tokens: int,
    team: ProcessGroup = SINGLE,
) -> Score:
    """Score the first `tokens` of the stream, or all if it has fewer; the processes of a team share the work.

    Up to rounding the result depends neither on the batch size nor on the team; all processes return the same.
    """
    batches = _shared(_first(evaluation_batches(stream, context, batch_size), tokens), team)
    scores = team.gather(lambda: score(model, batches, token_bytes_V))
    return Score(*map(sum, zip(*map(astuple, scores), strict=True)))


def score(model: LanguageModel, batches: Batches, token_bytes_V: np.ndarray) -> Score:
    """Score batches of inputs, targets and mask [B, T] where the mask is true, in evaluation mode.

    Sums are in float64, so they depend on batching only through the rounding of individual losses.
    """
    was_training = model.training
    model.eval()
    tokens, nats, text_nats, text_bytes = 0, 0.0, 0.0, 0
    for scored, targets, sizes in scored_tokens(model, batches, token_bytes_V):
        tokens += len(targets)
        nats += scored.sum().item()
        text_nats += scored[sizes > 0].sum().item()
        text_bytes += int(sizes.sum())
    model.train(was_training)
    return Score(tokens, nats, text_nats, text_bytes)


@torch.no_grad()
def scored_tokens(model: LanguageModel, batches: Batches, token_bytes_V: np.ndarray) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """For each batch the tokens where the mask is true, in order: nats in float64, ids and bytes of text, [n] each, on the CPU."""
    device = next(model.parameters()).device
    for inputs_BT, targets_BT, mask_BT in batches:
        nats_BT = token_losses(model, inputs_BT.to(device), targets_BT.to(device)).cpu()
        targets = targets_BT[mask_BT]
        yield nats_BT[mask_BT].double(), targets, torch.from_numpy(token_bytes_V)[targets]


def _shared(batches: Batches, team: ProcessGroup) -> Iterator[Batch]:
    """Every n-th batch, for this process of n.

    If the batches do not divide evenly, some processes repeat the last one with an all-false mask: processes with sharded weights
    must run all forward passes together.
    """
    batches = iter(batches)
    while taken := list(islice(batches, team.size)):
        inputs_BT, targets_BT, mask_BT = taken[min(team.rank, len(taken) - 1)]
        yield inputs_BT, targets_BT, mask_BT & (team.rank < len(taken))


def _first(batches: Batches, tokens: int) -> Iterator[Batch]:
    """The same batches, with the mask false after the first `tokens` positions."""
    left = tokens
    for inputs_BT, targets_BT, mask_BT in batches:
        yield inputs_BT, targets_BT, mask_BT & (torch.arange(mask_BT.numel()).view_as(mask_BT) < left)
        left -= mask_BT.numel()
        if left <= 0:
            return
