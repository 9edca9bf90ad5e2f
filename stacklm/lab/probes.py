"""Synthetic tasks with known answers, as token shards that training reads like any other: diagnostics of what a model can do.

Each has `symbols`, the number of symbols without end and mark; `chance`, the best accuracy without using the context; and `draw`,
which returns documents and the spacing of their answers: 2 if every answer is preceded by a question, else 1.

A document is a context, the mark, and questions with their answers (or only answers). All documents of a task have the same
length, and the context length of training is chosen so that each sequence is one document. Only answers are targets of the loss;
accuracy is the share of answers to which the model gives the highest probability.

Dimension letters: D documents, L tokens per document. Random numbers are raw Philox bits, the same in every numpy version.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from itertools import permutations, product
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray

from stacklm.code import digest
from stacklm.config.schema import Count, Natural, ParamsError, Range, plain
from stacklm.data.documents import SPLITS
from stacklm.data.shards import TARGETS, VERSION, file_name
from stacklm.files import sha256, write_json, written_aside

END, MARK, FIRST = 0, 1, 2
"""Ids of the end token, the mark before the answers, and the first symbol of a task."""
HELD_OUT = 500
"""Documents in the valid set, and in the test set."""

Ids = NDArray[np.int64]
Short = Annotated[int, Range(1, 512)]


@dataclass(frozen=True)
class KHop:
    """Pairs `x f(x)` in random order, where f consists of cycles; then one x per cycle, to be followed by f(f(..x)), k times.

    Backwards along the cycle an answer is `cycle_length - k` steps away; while that is more than k, there is no shorter path.
    """

    k: Short = 1
    cycles: Short = 3
    cycle_length: Short = 17
    documents: Count = 20_000
    seed: Natural = 1
    kind: Literal["khop"] = "khop"

    def __post_init__(self) -> None:
        if self.cycle_length <= 2 * self.k:
            raise ParamsError(
                f"cycle_length: {self.cycle_length} must be above twice k = {self.k}; else there is a shorter way back"
            )

    @property
    def symbols(self) -> int:
        return self.cycles * self.cycle_length

    @property
    def chance(self) -> float:
        return 1 / self.symbols

    def draw(self, bits: Bits, documents: int) -> tuple[Ids, int]:
        nodes_DCM = bits.orders(documents, self.symbols).reshape(documents, self.cycles, self.cycle_length)
        pairs = np.stack([nodes_DCM, np.roll(nodes_DCM, -1, axis=2)], axis=-1).reshape(documents, self.symbols, 2)
        shuffled = np.take_along_axis(pairs, bits.orders(documents, self.symbols)[:, :, None], axis=1)
        start_DC1 = bits.below(self.cycle_length, documents, self.cycles, 1)
        asked = np.concatenate([start_DC1, (start_DC1 + self.k) % self.cycle_length], axis=2)
        return _documents(shuffled, np.take_along_axis(nodes_DCM, asked, axis=2)), 2


@dataclass(frozen=True)
class Recall:
    """Multi-query associative recall (Arora et al. 2023, arXiv:2312.04927): key-value pairs, then all keys in another order, each
    to be followed by its value."""

    pairs: Short = 8
    keys: Short = 64
    values: Short = 64
    documents: Count = 20_000
    seed: Natural = 1
    kind: Literal["recall"] = "recall"

    def __post_init__(self) -> None:
        if self.keys < self.pairs:
            raise ParamsError(f"keys: {self.keys} are fewer than pairs = {self.pairs}, whose keys differ")

    @property
    def symbols(self) -> int:
        return self.keys + self.values

    @property
    def chance(self) -> float:
        return 1 / self.values

    def draw(self, bits: Bits, documents: int) -> tuple[Ids, int]:
        keys_DP = bits.orders(documents, self.keys)[:, : self.pairs]
        pairs = np.stack([keys_DP, self.keys + bits.below(self.values, documents, self.pairs)], axis=-1)
        return _documents(pairs, np.take_along_axis(pairs, bits.orders(documents, self.pairs)[:, :, None], axis=1)), 2


@dataclass(frozen=True)
class Copying:
    """Selective copying (Gu and Dao 2023, arXiv:2312.00752): a few symbols among blanks, to be repeated in order."""

    copied: Short = 8
    length: Short = 48
    alphabet: Short = 16
    documents: Count = 20_000
    seed: Natural = 1
    kind: Literal["copying"] = "copying"

    def __post_init__(self) -> None:
        if self.length < self.copied:
            raise ParamsError(f"length: {self.length} has no room for copied = {self.copied} symbols")

    @property
    def symbols(self) -> int:
        return self.alphabet + 1

    @property
    def chance(self) -> float:
        return 1 / self.alphabet

    def draw(self, bits: Bits, documents: int) -> tuple[Ids, int]:
        symbols = bits.below(self.alphabet, documents, self.copied)
        context = np.full((documents, self.length), self.alphabet)
        places = np.sort(bits.orders(documents, self.length)[:, : self.copied], axis=1)
        np.put_along_axis(context, places, symbols, axis=1)
        return _documents(context, symbols), 1


@dataclass(frozen=True)
class Word:
    """The product of a sequence of group elements, from left to right. `parity`: bits; `s3`: the permutations of three items, which
    do not commute (Liu et al. 2022, arXiv:2210.10749)."""

    group: Literal["parity", "s3"] = "parity"
    length: Short = 16
    documents: Count = 20_000
    seed: Natural = 1
    kind: Literal["word"] = "word"

    @property
    def symbols(self) -> int:
        return len(self.table)

    @property
    def table(self) -> Ids:
        """The multiplication table of the group, [G, G]; element 0 is the identity."""
        if self.group == "parity":
            return np.array([[0, 1], [1, 0]])
        elements = list(permutations(range(3)))
        products = [elements.index(tuple(a[i] for i in b)) for a, b in product(elements, repeat=2)]
        return np.array(products).reshape(6, 6)

    @property
    def chance(self) -> float:
        return 1 / self.symbols

    def draw(self, bits: Bits, documents: int) -> tuple[Ids, int]:
        table, word = self.table, bits.below(self.symbols, documents, self.length)
        state = word[:, 0]
        for column in word.T[1:]:
            state = table[state, column]
        return _documents(word, state), 1


@dataclass(frozen=True)
class Arithmetic:
    """An expression of sums, differences and products in prefix notation, `- * 3 5 2`, to be followed by its value modulo a number,
    like the task Mano (Allen-Zhu 2025)."""

    operations: Short = 2
    modulus: Short = 23
    documents: Count = 20_000
    seed: Natural = 1
    kind: Literal["arithmetic"] = "arithmetic"

    @property
    def symbols(self) -> int:
        return self.modulus + 3

    @property
    def chance(self) -> float:
        """The probability of the most frequent value: products make 0 more frequent than the others."""
        values = np.arange(self.modulus)
        results = [values[:, None] + values, values[:, None] - values, values[:, None] * values]
        shares = [np.full(self.modulus, 1 / self.modulus)]
        for n in range(1, self.operations + 1):
            pairs = np.mean([np.outer(shares[i], shares[n - 1 - i]) for i in range(n)], axis=0)
            counts = [np.bincount((result % self.modulus).ravel(), pairs.ravel(), self.modulus) for result in results]
            shares.append(np.mean(counts, axis=0))
        return float(shares[-1].max())

    def draw(self, bits: Bits, documents: int) -> tuple[Ids, int]:
        drawn = [self._expression(bits, self.operations) for _ in range(documents)]
        return _documents(np.array([ids for ids, _ in drawn]), np.array([value for _, value in drawn])), 1

    def _expression(self, bits: Bits, operations: int) -> tuple[list[int], int]:
        if not operations:
            value = bits.one(self.modulus)
            return [value], value
        sign, inside = bits.one(3), bits.one(operations)
        (left, a), (right, b) = self._expression(bits, inside), self._expression(bits, operations - 1 - inside)
        return [self.modulus + sign, *left, *right], (a + b, a - b, a * b)[sign] % self.modulus


Probe = KHop | Recall | Copying | Word | Arithmetic


class Bits:
    """Random integers for one split of a task."""

    def __init__(self, seed: int, split: int) -> None:
        self._bits = np.random.Philox(key=np.array([seed, split], dtype=np.uint64))

    def below(self, high: int, *shape: int) -> Ids:
        """Integers from 0 to `high - 1`; the modulo bias is below 2**-50."""
        return (self._bits.random_raw(int(np.prod(shape))) % np.uint64(high)).astype(np.int64).reshape(shape)

    def one(self, high: int) -> int:
        return self._bits.random_raw() % high

    def orders(self, rows: int, count: int) -> Ids:
        """A permutation of 0 to `count - 1` in each row."""
        return np.argsort(self._bits.random_raw(rows * count).reshape(rows, count), axis=1, kind="stable")


def _documents(context: Ids, questions: Ids) -> Ids:
    """Documents [D, L] from context and questions, with the mark in between and the end token last."""
    context, questions = (part.reshape(len(part), -1) + FIRST for part in (context, questions))
    one = np.ones((len(context), 1), np.int64)
    return np.concatenate([context, MARK * one, questions, END * one], axis=1)


def drawn(probe: Probe, split: str, documents: int) -> tuple[Ids, NDArray[np.bool_]]:
    """Documents [D, L] of one split of a task, and a mask of the answers, [L]: every n-th token after the mark."""
    ids_DL, every = probe.draw(Bits(probe.seed, SPLITS.index(split)), documents)
    answers_L = np.zeros(ids_DL.shape[1], bool)
    mark = int(np.flatnonzero(ids_DL[0] == MARK)[0])
    answers_L[mark + every : -1 : every] = True
    return ids_DL, answers_L


def vocab_size(probe: Probe) -> int:
    return FIRST + probe.symbols


def context_length(probe: Probe) -> int:
    """Tokens per document, including the end token."""
    return drawn(probe, "test", 1)[0].shape[1]


def write_probe(probe: Probe, folder: Path) -> None:
    """Write shards of the task, with its answers as the targets of the loss; does nothing if they exist already.

    No document is in two splits. Raises `ParamsError` for a task with too few different documents.
    """
    if (folder / "manifest.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    splits, answers = {}, {}
    seen: set[bytes] = set()
    for split in reversed(SPLITS):  # held-out splits first, since training must not see their documents
        ids_DL, answers_L = drawn(probe, split, probe.documents if split == "train" else HELD_OUT)
        rows = [row.tobytes() for row in ids_DL]
        new = np.array([row not in seen for row in rows])
        if new.mean() < 0.2:
            raise ParamsError(f"the task has too few different documents: {new.mean():.0%} of the {split} set are in no other set")
        ids_DL, seen = ids_DL[new], seen.union(rows)
        data, file = ids_DL.astype("<u2").tobytes(), file_name(split, 0)
        with written_aside(folder / file) as aside:
            aside.write_bytes(data)
        shard = {"file": file, "tokens": ids_DL.size, "sha256": hashlib.sha256(data).hexdigest()}
        size = int((ids_DL >= FIRST).sum())
        splits[split] = {"tokens": ids_DL.size, "documents": len(ids_DL), "bytes": size, "words": size, "shards": [shard]}
        answers[split] = np.tile(answers_L, len(ids_DL))
    with written_aside(folder / TARGETS) as aside, aside.open("wb") as file:
        np.savez_compressed(file, **answers)
    manifest = {
        "version": VERSION,
        "dtype": "uint16",
        "vocab_size": vocab_size(probe),
        "end_id": END,
        "tokenizer": digest(plain(probe)),
        "token_bytes": [0] * FIRST + [1] * probe.symbols,
        "splits": {split: splits[split] for split in SPLITS},
        "targets": sha256(folder / TARGETS),
    }
    write_json(folder / "manifest.json", manifest)  # last: its presence marks the shards as complete
