"""Which tokens the batches and the loss ask for, and what can be learned from random tokens: nothing.

Batches and loss are tested with an oracle that knows the stream: it is right about one position only. `Machinery` is what turns
tokens into losses: that of this package, unless a test puts a fault in its place.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stacklm.audit import Fault
from stacklm.config.optimizer import AdamW
from stacklm.config.train import Train
from stacklm.data.batches import TrainBatches, evaluation_batches
from stacklm.data.shards import Shards, TokenStream
from stacklm.model.layers import Head, LanguageModel
from stacklm.train.loss import Objective
from stacklm.train.optimizer import build_optimizer
from stacklm.train.validate import Score, score

VOCAB, EPOCHS = 64, 2
READ_TOKENS = 1 << 22
SURE = 30.0
"""The logit of a token that is held for certain: a loss of 1e-11 where it comes, of 30 nats where another does."""
FEW, CONTEXT, BATCH, STEPS = 8, 4, 32, 36
"""What is learned: tokens of a small vocabulary, in steps of `BATCH` short sequences."""
OPTIMIZER = AdamW(peak_lr=3e-3)
NOISE = 7.0
"""Standard errors below ln V at which a loss is no longer chance: one run in 88,000, with an error told from 12 steps."""


@dataclass(frozen=True)
class Machinery:
    """Batches of sequences, what training makes of them, and the score of a stream."""

    train_batches: Callable[[TokenStream, int, int, int], TrainBatches] = TrainBatches
    evaluation_batches: Callable[[TokenStream, int, int], Iterator[tuple[Tensor, Tensor, Tensor]]] = evaluation_batches
    objective: Callable[[LanguageModel], nn.Module] = Objective
    score: Callable[..., Score] = score


class Uniform(LanguageModel):
    """Every token is as likely as any other."""

    def __init__(self) -> None:
        super().__init__()
        self.head = Head(1, VOCAB)
        nn.init.zeros_(self.head.weight)

    def features(self, ids_BT: Tensor) -> Tensor:
        return torch.zeros(*ids_BT.shape, 1)


class Oracle(LanguageModel):
    """In the stream 0, 1, 2, ..., certain of the token `ahead` positions on."""

    def __init__(self, ahead: int) -> None:
        super().__init__()
        self.ahead = ahead
        self.head = Head(VOCAB, VOCAB)
        nn.init.eye_(self.head.weight)

    def features(self, ids_BT: Tensor) -> Tensor:
        return SURE * F.one_hot((ids_BT + self.ahead) % VOCAB, VOCAB).float()


def counting(tokens: int, vocab_size: int) -> TokenStream:
    """The stream 0, 1, 2, ..., which begins again after the last id of the vocabulary, the end token."""
    return TokenStream([np.arange(tokens) % vocab_size], vocab_size - 1, documents=0, bytes=0, words=0)


def labels(machinery: Machinery, train: Train) -> str:
    """the loss at a position asks for the very next token of the stream, in training and in evaluation"""
    stream = counting(EPOCHS * train.tokens_per_step, VOCAB)

    def training(oracle: Oracle) -> float:
        batches = machinery.train_batches(stream, train.context_length, train.global_batch_size, 0)
        objective = machinery.objective(oracle)
        parts = (zip(*(part.split(train.micro_batch_size) for part in batches.batch(step)), strict=True) for step in range(EPOCHS))
        return sum(objective(*part).item() for step in parts for part in step)

    def evaluation(oracle: Oracle) -> float:
        batches = machinery.evaluation_batches(stream, train.context_length, train.micro_batch_size)
        return machinery.score(oracle, batches, np.ones(VOCAB, dtype=np.int64)).nats

    for name, nats in {"training": training, "evaluation": evaluation}.items():
        right = [ahead for ahead in range(-2, 4) if nats(Oracle(ahead)) < 1]
        if right != [1]:
            asked = " and ".join(f"the token {ahead} positions on" for ahead in right) or "no one position"
            raise Fault(f"shifted labels: in {name} the loss asks for {asked}, and not for the next token")
    return f"{2 * len(stream)} positions, in batches of {train.global_batch_size} sequences of {train.context_length}"


def sequences(machinery: Machinery, train: Train) -> str:
    """training sequences do not overlap: every token of the stream is trained on once an epoch"""
    count, context = 4 * train.global_batch_size, train.context_length
    tokens = count * context
    batches = machinery.train_batches(counting(tokens, tokens), context, train.global_batch_size, 0)
    targets = torch.cat([batches.batch(step)[1] for step in range(EPOCHS * count // train.global_batch_size)]).numpy()
    starts = np.unique(targets[:, 0])
    nearest = np.diff(starts).min(initial=context)
    if nearest < context:
        raise Fault(
            f"sequences overlap: of {context} tokens each, they begin as near as {nearest} apart, and tokens are seen again"
        )
    seen = np.bincount(targets.ravel(), minlength=tokens)
    if (seen != EPOCHS).any():
        often = seen[seen > 0]
        raise Fault(
            f"sequences are not seen once an epoch: in {EPOCHS} epochs of {tokens} tokens, {len(often)} of them were targets, "
            f"{often.min()} to {often.max()} times each"
        )
    return f"{EPOCHS} epochs of {count} sequences"


def padding(machinery: Machinery, train: Train) -> str:
    """every token of an evaluated stream is scored once, and the padding of its last batch is not"""
    size = train.micro_batch_size * train.context_length
    tokens = 2 * size + train.context_length + train.context_length // 2
    batches = machinery.evaluation_batches(counting(tokens, VOCAB), train.context_length, train.micro_batch_size)
    result = machinery.score(Oracle(1), batches, np.ones(VOCAB, dtype=np.int64))
    if result.tokens != tokens or result.loss > 1:
        raise Fault(
            f"padding inside the loss: {result.tokens} tokens were scored in a stream of {tokens}, with a mean loss of "
            f"{result.loss:.2f} where each token of the stream is certain"
        )
    return f"{tokens} tokens in batches of {size}"


def uniform(machinery: Machinery, train: Train) -> str:
    """a model that finds all V tokens equally likely has log2 V bits per token, divided among the bytes of the text"""
    stream = counting(train.micro_batch_size * train.context_length + VOCAB, VOCAB)
    sizes_V = np.arange(VOCAB) % 4  # those of no bytes are special tokens, which count in the loss alone
    sizes = sizes_V[stream[: len(stream)]]
    result = machinery.score(Uniform(), machinery.evaluation_batches(stream, train.context_length, train.micro_batch_size), sizes_V)
    wanted = {"loss": math.log(VOCAB), "bits_per_byte": math.log2(VOCAB) * int((sizes > 0).sum()) / int(sizes.sum())}
    for name, value in wanted.items():
        found = getattr(result, name)
        if not abs(found / value - 1) <= 4 * torch.finfo(torch.float32).eps:  # the rounding of one loss; sums are in float64
            raise Fault(f"wrong units: a uniform model over {VOCAB} tokens has a {name} of {found:.6f}, not {value:.6f}")
    return f"{wanted['bits_per_byte']:.4f} bits per byte"


CHECKS = (labels, sequences, padding, uniform)


def splits(data: Shards) -> str:
    """no document of the valid and test splits is in another split"""
    held_out: dict[bytes, str] = {}
    documents = 0
    for split in ("valid", "test", "train"):
        for document in _documents(data.split(split)):
            digest = hashlib.blake2b(document, digest_size=16).digest()
            if held_out.get(digest, split) != split:
                raise Fault(f"splits overlap: document {documents} of those of {split} is also in {held_out[digest]}")
            documents += 1
            if split != "train":
                held_out[digest] = split
    return f"{len(held_out)} documents for validation and test, {documents} in all"


def sizes(data: Shards) -> str:
    """the tokens of every split stand for as many bytes and documents as its text has"""
    found = []
    for name in data.splits:
        stream = data.split(name)
        counts = np.sum([np.bincount(part, minlength=data.vocab_size) for part in _parts(stream)], axis=0)
        size, documents = int(counts @ data.token_bytes), int(counts[data.end_id])
        if (size, documents) != (stream.bytes, stream.documents):
            raise Fault(
                f"wrong sizes: the tokens of {name} stand for {size} bytes in {documents} documents, but its text has "
                f"{stream.bytes} in {stream.documents}"
            )
        found.append(f"{name} {size} bytes")
    return ", ".join(found)


SHARDS = (splits, sizes)


def _parts(stream: TokenStream) -> Iterator[np.ndarray]:
    for start in range(0, len(stream), READ_TOKENS):
        yield stream[start : start + READ_TOKENS]


def _documents(stream: TokenStream) -> Iterator[bytes]:
    """The ids of each document, its end token included, as bytes."""
    rest = np.empty(0, np.int64)
    for part in _parts(stream):
        tokens = np.concatenate([rest, part])
        start = 0
        for end in (np.flatnonzero(tokens == stream.end_id) + 1).tolist():
            yield tokens[start:end].tobytes()
            start = end
        rest = tokens[start:]
    if len(rest):
        yield rest.tobytes()


def floor(fresh: Callable[[int, int], LanguageModel], machinery: Machinery) -> str:
    """trained on random tokens, each seen once, the model does not go below a loss of ln V

    `fresh` builds a model for a vocabulary and a context, both small here. A loss is taken before the update with its batch, so
    that of a causal model cannot be expected to be below; with a leak it is within seconds.
    """
    model = fresh(FEW, CONTEXT)
    tokens = np.random.Philox(key=0).random_raw(STEPS * BATCH * CONTEXT).astype(np.int64) % FEW
    losses = learn(model, TokenStream([tokens], FEW - 1, documents=0, bytes=0, words=0), CONTEXT, STEPS, machinery)
    above = torch.tensor(losses[-STEPS // 3 :], dtype=torch.float64) - math.log(FEW)
    mean, error = above.mean().item(), above.std().item() / len(above) ** 0.5
    if not mean > -NOISE * error:
        raise Fault(
            f"below the floor: a loss of {math.log(FEW) + mean:.3f} nats on random tokens, where none can have less than "
            f"ln {FEW} = {math.log(FEW):.3f} ({-mean / error:.0f} standard errors): the model is told the answer"
        )
    return f"{mean:+.4f} nats from ln {FEW} after {STEPS} steps, noise {error:.4f}"


def learn(model: LanguageModel, stream: TokenStream, context: int, steps: int, machinery: Machinery) -> list[float]:
    """Some steps of training in place; the mean loss of each, in nats per token, before its update."""
    return list(learning(model, stream, context, steps, machinery))


def learning(
    model: LanguageModel,
    stream: TokenStream,
    context: int,
    steps: int,
    machinery: Machinery,
    batch_size: int = BATCH,
    config: AdamW = OPTIMIZER,
) -> Iterator[float]:
    """The same, one step each time that a loss is asked for."""
    device = next(model.parameters()).device
    optimizer = build_optimizer(model.train(), config)
    objective = machinery.objective(model)
    batches = machinery.train_batches(stream, context, batch_size, 0)
    for step in range(steps):
        inputs_BT, targets_BT = (tensor.to(device) for tensor in batches.batch(step))
        loss = objective(inputs_BT, targets_BT) / targets_BT.numel()
        model.zero_grad()
        try:
            loss.backward()
        except RuntimeError as error:
            if "second time" not in str(error):
                raise
            raise Fault("state between batches: gradients of one batch lead back into the batch before") from None
        optimizer.step()
        yield loss.item()


def steps(model: LanguageModel, vocab_size: int, context: int, machinery: Machinery) -> str:
    """training takes one step after the other, and gradients of a batch stay within it"""
    train_briefly(model, vocab_size, context, machinery)
    return "4 steps"


def train_briefly(model: LanguageModel, vocab_size: int, context: int, machinery: Machinery) -> None:
    """A few steps, in place, on a stream that can be learned: every weight moves, also those behind others that begin at zero."""
    context = min(context, CONTEXT)
    learn(model, counting(max(vocab_size, BATCH * context), vocab_size), context, steps=4, machinery=machinery)
