"""Synthetic tasks: every answer is compared with that of an independent solver."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from stacklm.config.schema import ParamsError
from stacklm.data.batches import IGNORED, TrainBatches
from stacklm.data.shards import Shards
from stacklm.files import sha256
from stacklm.lab.probes import (
    END,
    FIRST,
    MARK,
    Arithmetic,
    Copying,
    KHop,
    Probe,
    Recall,
    Word,
    context_length,
    drawn,
    vocab_size,
    write_probe,
)

PROBES = {
    **{f"{k} hops": KHop(k=k) for k in range(1, 9)},
    "recall": Recall(),
    "copying": Copying(),
    "parity": Word(),
    "s3": Word(group="s3", length=5),
    **{f"{n} operations": Arithmetic(operations=n) for n in (1, 3)},
}


def solved(probe: Probe, context: list[int], questions: list[int]) -> list[int]:
    """The answers by reading the document as a person would; `questions` are the tokens after the mark."""
    match probe:
        case KHop():
            follows = dict(zip(context[::2], context[1::2], strict=True))
            assert len(follows) == probe.symbols == len({*follows.values()})
            answers = []
            for node in questions[::2]:
                for _ in range(probe.k):
                    node = follows[node]
                answers.append(node)
            return answers
        case Recall():
            value = dict(zip(context[::2], context[1::2], strict=True))
            assert len(value) == probe.pairs
            return [value[key] for key in questions[::2]]
        case Copying():
            blank = probe.alphabet
            return [symbol for symbol in context if symbol != blank]
        case Word(group="parity"):
            return [sum(context) % 2]
        case Word():
            matrices = [np.eye(3)[list(order)] for order in [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]]
            found = np.eye(3)
            for element in context:
                found = matrices[element] @ found  # taking rows of the identity turns the order of products around
            (answer,) = [i for i, matrix in enumerate(matrices) if (matrix == found).all()]
            return [answer]
        case Arithmetic():
            stack: list[int] = []
            for token in reversed(context):
                if token < probe.modulus:
                    stack.append(token)
                else:
                    a, b = stack.pop(), stack.pop()
                    stack.append([a + b, a - b, a * b][token - probe.modulus])
            (value,) = stack
            return [value % probe.modulus]


@pytest.mark.parametrize("probe", PROBES.values(), ids=PROBES)
def test_answers_are_those_of_an_independent_solver_and_chance_is_right(probe):
    ids_DL, answers_L = drawn(probe, "train", 400)
    given = []
    for ids in ids_DL:
        *body, end = ids.tolist()
        assert end == END and body.count(MARK) == 1 and END not in body and max(body) < vocab_size(probe)
        mark = body.index(MARK)
        context, questions = ([symbol - FIRST for symbol in part] for part in (body[:mark], body[mark + 1 :]))
        given.append((ids[answers_L] - FIRST).tolist())
        assert solved(probe, context, questions) == given[-1]
    flat = [answer for answers in given for answer in answers]
    most, n = Counter(flat).most_common(1)[0][1], len(flat)
    # five standard errors: of several that are equally likely the most frequent one is above its share
    assert abs(most / n - probe.chance) < 5 * np.sqrt(probe.chance * (1 - probe.chance) / n)


@pytest.mark.parametrize("probe", PROBES.values(), ids=PROBES)
def test_a_training_sequence_is_one_document_and_splits_and_seeds_differ(probe, tmp_path):
    small = replace(probe, documents=30)
    write_probe(small, tmp_path / "one")
    data, context = Shards.open(tmp_path / "one"), context_length(small)
    inputs_BT, targets_BT = TrainBatches(data.split("train"), context, 8, seed=1).batch(0)
    assert (inputs_BT[:, 0] == END).all() and (inputs_BT[:, 1:] != END).all() and (targets_BT[:, -1] == IGNORED).all()
    for split in ("train", "valid", "test"):
        ids, answers = data.split(split)[:], data.split(split).targets
        assert len(ids) == len(answers) and (ids[answers] >= FIRST).all()
    before = sha256(tmp_path / "one")
    write_probe(small, tmp_path / "one")
    write_probe(small, tmp_path / "again")
    assert sha256(tmp_path / "one") == before == sha256(tmp_path / "again")
    first = {split: drawn(small, split, 30)[0].tolist() for split in ("train", "valid", "test")}
    others = [*first.values(), drawn(replace(small, seed=2), "train", 30)[0].tolist()]
    assert all(a != b for i, a in enumerate(others) for b in others[:i])


def test_no_document_is_in_two_splits_and_a_task_without_enough_of_them_is_refused(tmp_path):
    write_probe(Arithmetic(operations=1), tmp_path / "few")  # 1,587 different ones
    data = Shards.open(tmp_path / "few")
    ids_DL = {split: data.split(split)[:].reshape(-1, 6) for split in ("train", "valid", "test")}
    documents = {split: {row.tobytes() for row in ids} for split, ids in ids_DL.items()}
    assert not documents["test"] & documents["valid"] and not documents["train"] & (documents["test"] | documents["valid"])
    assert len(ids_DL["test"]) == 500 > len(ids_DL["valid"]) > 300
    with pytest.raises(ParamsError, match="too few different documents: 0% of the valid set"):
        write_probe(Word(length=4), tmp_path / "none")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: KHop(k=9), r"cycle_length: 17 must be above twice k = 9"),
        (lambda: Recall(pairs=65), r"keys: 64 are fewer than pairs = 65"),
        (lambda: Copying(copied=49), r"length: 48 has no room for copied = 49"),
    ],
)
def test_tasks_that_cannot_be_drawn_are_refused(make, message):
    with pytest.raises(ParamsError, match=message):
        make()


def test_the_bits_are_the_same_on_every_machine():
    ids_DL, _ = drawn(Recall(pairs=2, keys=4, values=4), "train", 1)
    assert ids_DL.tolist() == [[5, 6, 4, 7, 1, 4, 7, 5, 6, 0]]
