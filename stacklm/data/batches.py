"""Batches of token sequences. Which sequences a step sees is a pure function of the seed and the step."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch

from stacklm.data import DataError
from stacklm.data.shards import TokenStream

IGNORED = -100
"""Target value excluded from the loss, as in torch's `cross_entropy`."""


class TrainBatches:
    """The stream as disjoint sequences of T = `context` targets, every sequence once per epoch, reshuffled for each epoch.

    Sequence i predicts the tokens i*T to (i+1)*T - 1, each from the ones before it; the first token of the stream is predicted
    from the end token. The up to T - 1 tokens after the last whole sequence are not trained on. If `parts` processes share the
    batches, each returns the rows of its own `part`. Raises `DataError` if the stream is shorter than one sequence.
    """

    def __init__(self, stream: TokenStream, context: int, batch_size: int, seed: int, part: int = 0, parts: int = 1) -> None:
        self.sequences = len(stream) // context
        if not self.sequences:
            raise DataError(f"{len(stream):,} tokens to train on are fewer than train.context_length = {context}; give more text")
        self.stream, self.context, self.batch_size, self.seed = stream, context, batch_size, seed
        self.rows = range(part * batch_size // parts, (part + 1) * batch_size // parts)

    def batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets of this part of a step's batch, int64 [B / parts, T] each.

        A batch may span the end of one epoch and the start of the next. Tokens that are not targets are `IGNORED`.
        """
        indices = self.indices(step)
        starts = [indices[row] * self.context for row in self.rows]
        rows = torch.from_numpy(np.stack([_with_previous(self.stream, start, start + self.context) for start in starts]))
        inputs, targets = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
        if self.stream.targets is not None:
            kept = np.stack([self.stream.targets[start : start + self.context] for start in starts])
            targets[~torch.from_numpy(kept)] = IGNORED
        return inputs, targets

    def targets(self, step: int) -> int:
        """Number of targets in a step's whole batch."""
        if self.stream.targets is None:
            return self.batch_size * self.context
        starts = (i * self.context for i in self.indices(step))
        return sum(int(self.stream.targets[start : start + self.context].sum()) for start in starts)

    def indices(self, step: int) -> list[int]:
        """The indices of the sequences in a step's whole batch, in order."""
        positions = (divmod(step * self.batch_size + row, self.sequences) for row in range(self.batch_size))
        return [int(_order(self.sequences, self.seed, epoch)[i]) for epoch, i in positions]


def evaluation_batches(
    stream: TokenStream, context: int, batch_size: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yield inputs, targets (int64) and mask (bool), each [B, T]: every token of the stream is a target exactly once, in order.

    The mask is false where the last batch is padded with the end token, and for tokens that are not targets of the loss. A token
    is predicted from those before it in its sequence and the one just before the sequence, whatever the batch size.
    """
    size = batch_size * context
    for start in range(0, len(stream), size):
        tokens = _with_previous(stream, start, start + size)
        count = len(tokens) - 1
        padded = np.full(size + 1, stream.end_id, dtype=np.int64)
        padded[: count + 1] = tokens
        mask = np.arange(size) < count
        if stream.targets is not None:
            mask[:count] = stream.targets[start : start + count]
        rows = padded[:-1].copy(), padded[1:].copy(), mask
        inputs, targets, kept = (torch.from_numpy(row.reshape(batch_size, context)) for row in rows)
        yield inputs, targets, kept


def _with_previous(stream: TokenStream, start: int, stop: int) -> np.ndarray:
    """The tokens start - 1 to stop - 1; the first token is preceded by the end token."""
    if start:
        return stream[start - 1 : stop]
    return np.concatenate([[stream.end_id], stream[:stop]])


@lru_cache(maxsize=2)
def _order(count: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of 0 to count - 1, from raw Philox bits (Salmon et al. 2011), which are the same in every numpy version."""
    bits = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(count)
    return np.argsort(bits, kind="stable")
