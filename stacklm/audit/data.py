"""Which tokens the batches and the loss ask for. An oracle that knows the stream tells: it is right about one place only.

`Machinery` is what turns tokens into losses: that of this package, unless a test puts a fault in its place.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stacklm.audit.certificate import Fault, claims
from stacklm.data.batches import TrainBatches, evaluation_batches
from stacklm.data.shards import TokenStream
from stacklm.train.loss import Objective
from stacklm.train.validate import Score, score

VOCAB = 64
CONTEXT, BATCH = 8, 3
EPOCHS = 4
SURE = 30.0
"""The logit of a token that is held for certain: a loss of 1e-11 where it comes, of 30 nats where another does."""


@dataclass(frozen=True)
class Machinery:
    """Batches of windows, what training makes of them, and the score of a stream."""

    train_batches: Callable[[TokenStream, int, int, int], TrainBatches] = TrainBatches
    evaluation_batches: Callable[[TokenStream, int, int], Iterator[tuple[Tensor, Tensor, Tensor]]] = evaluation_batches
    objective: Callable[[nn.Module], nn.Module] = Objective
    score: Callable[..., Score] = score


class Oracle(nn.Module):
    """In the stream 0, 1, 2, ..., certain of the token `ahead` places on."""

    def __init__(self, ahead: int) -> None:
        super().__init__()
        self.ahead = ahead
        self.head = nn.Linear(VOCAB, VOCAB, bias=False)
        nn.init.eye_(self.head.weight)

    def features(self, ids_BT: Tensor) -> Tensor:
        return SURE * F.one_hot((ids_BT + self.ahead) % VOCAB, VOCAB).float()

    def forward(self, ids_BT: Tensor) -> Tensor:
        return self.head(self.features(ids_BT))


def counting(tokens: int, vocab_size: int) -> TokenStream:
    """The stream 0, 1, 2, ..., which begins anew after the last id of the vocabulary, the end token."""
    return TokenStream([np.arange(tokens) % vocab_size], vocab_size - 1, documents=0, bytes=0, words=0)


@claims("the loss at a position asks for the very next token of the stream, in training and in evaluation")
def labels(machinery: Machinery) -> str:
    stream = counting(BATCH * CONTEXT * EPOCHS, VOCAB)

    def training(oracle: Oracle) -> float:
        batches = machinery.train_batches(stream, CONTEXT, BATCH, 0)
        return sum(machinery.objective(oracle)(*batches.batch(step)).item() for step in range(EPOCHS))

    def evaluation(oracle: Oracle) -> float:
        return machinery.score(oracle, machinery.evaluation_batches(stream, CONTEXT, BATCH), np.ones(VOCAB, dtype=np.int64)).nats

    for name, nats in {"training": training, "evaluation": evaluation}.items():
        right = [ahead for ahead in range(-2, 4) if nats(Oracle(ahead)) < 1]
        if right != [1]:
            asked = " and ".join(f"the token {ahead} places on" for ahead in right) or "no one place"
            raise Fault(f"shifted labels: in {name} the loss asks for {asked}, and not for the next token")
    return f"{2 * len(stream)} places"


@claims("training windows do not overlap: every token of the stream is trained on once an epoch")
def windows(machinery: Machinery) -> str:
    count = 4 * BATCH
    batches = machinery.train_batches(counting(count * CONTEXT, count * CONTEXT), CONTEXT, BATCH, 0)
    targets = torch.cat([batches.batch(step)[1] for step in range(EPOCHS * count // BATCH)])
    starts = Counter(targets[:, 0].tolist())
    nearest = min((b - a for a, b in zip(sorted(starts), sorted(starts)[1:], strict=False)), default=0)
    if 0 < nearest < CONTEXT:
        raise Fault(f"windows overlap: of {CONTEXT} tokens each, they begin as near as {nearest} apart, and tokens are seen again")
    seen = Counter(targets.flatten().tolist())
    if set(seen.values()) != {EPOCHS} or len(seen) != count * CONTEXT:
        raise Fault(
            f"windows are not seen once an epoch: in {EPOCHS} epochs of {count * CONTEXT} tokens, {len(seen)} of them were "
            f"targets, {min(seen.values())} to {max(seen.values())} times each"
        )
    return f"{EPOCHS} epochs of {count} windows"


@claims("every token of an evaluated stream is scored once, and the padding of its last batch is not")
def padding(machinery: Machinery) -> str:
    tokens = 2 * BATCH * CONTEXT + CONTEXT + 3
    batches = machinery.evaluation_batches(counting(tokens, VOCAB), CONTEXT, BATCH)
    result = machinery.score(Oracle(1), batches, np.ones(VOCAB, dtype=np.int64))
    if result.tokens != tokens or result.loss > 1:
        raise Fault(
            f"padding inside the loss: {result.tokens} tokens were scored in a stream of {tokens}, with a mean loss of "
            f"{result.loss:.2f} where each token of the stream is certain"
        )
    return f"{tokens} tokens in batches of {BATCH * CONTEXT}"


CHECKS = (labels, windows, padding)
