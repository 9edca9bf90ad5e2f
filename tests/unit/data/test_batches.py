"""Sequences and batches."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch

from stacklm.data import DataError
from stacklm.data.batches import IGNORED, TrainBatches, evaluation_batches
from stacklm.data.shards import TokenStream

END = 0


def stream_of(count, parts=1, targets=None):
    """Tokens 1, 2, ... so that a token tells its place; the end token, 0, occurs nowhere."""
    files = np.array_split(np.arange(1, count + 1, dtype=np.uint16), parts)
    return TokenStream(files, end_id=END, documents=1, bytes=count, words=1, targets=targets)


@pytest.mark.parametrize("parts", [1, 2])
def test_tokens_that_are_no_targets_are_read_but_not_asked_for(parts):
    """Those that three divides are targets, here."""
    tokens = np.arange(1, 104)
    stream = stream_of(103, targets=tokens % 3 == 0)
    shares = [TrainBatches(stream, context=10, batch_size=4, seed=1, part=part, parts=parts) for part in range(parts)]
    for step in range(10):
        found = [share.batch(step) for share in shares]
        inputs, targets = (torch.cat(rows) for rows in zip(*found, strict=True))
        assert torch.equal(targets, torch.where((inputs + 1) % 3 == 0, inputs + 1, IGNORED))
        assert all(share.targets(step) == (targets != IGNORED).sum() for share in shares)
    scored = [targets[mask] for _, targets, mask in evaluation_batches(stream, context=10, batch_size=4)]
    assert torch.cat(scored).tolist() == tokens[tokens % 3 == 0].tolist()


def test_targets_are_the_inputs_one_later_and_the_first_input_is_the_end_token():
    batches = TrainBatches(stream_of(103, parts=4), context=10, batch_size=3, seed=1)
    for step in range(20):
        inputs, targets = batches.batch(step)
        assert inputs.shape == targets.shape == (3, 10)
        assert inputs.dtype == targets.dtype == torch.int64
        assert inputs.is_contiguous() and targets.is_contiguous()  # they are split into micro-batches
        assert torch.equal(inputs, targets - 1)  # token n follows token n - 1, and 1 follows the end token
        assert ((targets[:, 0] - 1) % 10 == 0).all()


@pytest.mark.parametrize(("count", "context", "batch_size"), [(100, 10, 5), (109, 10, 3), (60, 7, 8), (11, 10, 4), (64, 1, 16)])
def test_every_target_is_seen_exactly_once_an_epoch(count, context, batch_size):
    batches = TrainBatches(stream_of(count), context, batch_size, seed=3)
    sequences = count // context
    steps = 3 * sequences  # so that whole epochs fit: sequences * batch_size sequences a round
    seen = torch.cat([batches.batch(step)[1] for step in range(steps)])
    for epoch in range(3 * batch_size):
        targets = seen[epoch * sequences : (epoch + 1) * sequences].flatten().tolist()
        assert sorted(targets) == list(range(1, sequences * context + 1))


@pytest.mark.parametrize("parts", [1, 2, 3, 6])
def test_processes_share_every_batch_with_nothing_repeated_or_left_out(parts):
    """Over two epochs, whose border lies inside a batch."""
    whole = TrainBatches(stream_of(104), context=10, batch_size=6, seed=5)
    shares = [TrainBatches(stream_of(104), 10, 6, seed=5, part=part, parts=parts) for part in range(parts)]
    seen = Counter()
    for step in range(20):
        found = [share.batch(step) for share in shares]
        assert {len(inputs) for inputs, _ in found} == {6 // parts}
        assert all(
            torch.equal(torch.cat(rows), wanted) for rows, wanted in zip(zip(*found, strict=True), whole.batch(step), strict=True)
        )
        assert all(share.indices(step) == whole.indices(step) for share in shares)
        seen.update(torch.cat([targets for _, targets in found]).flatten().tolist())
    assert seen == Counter(dict.fromkeys(range(1, 101), 12))


def test_each_epoch_and_each_seed_has_an_order_of_its_own():
    def epoch(seed, number):
        return TrainBatches(stream_of(500), context=5, batch_size=100, seed=seed).batch(number)[1][:, 0].tolist()

    orders = [epoch(seed, number) for seed in (1, 2) for number in (0, 1, 2)]
    assert len({tuple(order) for order in orders}) == 6
    assert len({tuple(sorted(order)) for order in orders}) == 1
    # a shuffle is no rotation: neighbours in one order are seldom neighbours in another
    neighbours = [set(pairwise(order)) for order in orders]
    assert max(len(a & b) for a in neighbours for b in neighbours if a is not b) < 10


def test_a_step_is_the_same_alone_and_after_others_and_in_any_order():
    steps = list(range(40))
    first = TrainBatches(stream_of(230), context=10, batch_size=6, seed=5)
    uninterrupted = [first.batch(step) for step in steps]
    for step in reversed(steps):
        resumed = TrainBatches(stream_of(230), context=10, batch_size=6, seed=5).batch(step)
        again = first.batch(step)
        for a, b, c in zip(uninterrupted[step], resumed, again, strict=True):
            assert torch.equal(a, b) and torch.equal(a, c)


def test_torch_and_numpy_global_randomness_neither_matters_nor_is_touched():
    torch.manual_seed(1)
    np.random.seed(1)
    one = TrainBatches(stream_of(100), 10, 4, seed=1).batch(3)
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    torch.manual_seed(2)
    assert torch.equal(TrainBatches(stream_of(100), 10, 4, seed=1).batch(3)[0], one[0])
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state[0])
    assert (np.random.get_state()[1] == state[1]).all()


def test_the_order_is_the_same_on_every_machine():
    batches = TrainBatches(stream_of(80), context=10, batch_size=8, seed=1)
    assert (batches.batch(0)[1][:, 0] // 10).tolist() == [3, 5, 2, 7, 0, 6, 1, 4]
    assert (batches.batch(1)[1][:, 0] // 10).tolist() == [0, 6, 5, 3, 4, 7, 2, 1]


def test_text_shorter_than_a_window_is_an_error_with_the_numbers():
    with pytest.raises(DataError, match=r"9 tokens to train on are fewer than train\.context_length = 10; give more text"):
        TrainBatches(stream_of(9), context=10, batch_size=1, seed=1)


@pytest.mark.parametrize(
    ("count", "context", "batch_size"), [(1, 4, 2), (8, 4, 2), (9, 4, 2), (23, 5, 3), (100, 7, 1), (100, 128, 4)]
)
def test_evaluation_targets_are_every_token_once_in_order(count, context, batch_size):
    seen = []
    for inputs, targets, mask in evaluation_batches(stream_of(count, parts=min(count, 3)), context, batch_size):
        assert inputs.shape == targets.shape == mask.shape == (batch_size, context)
        assert (inputs.dtype, targets.dtype, mask.dtype) == (torch.int64, torch.int64, torch.bool)
        assert torch.equal(inputs[mask], targets[mask] - 1)
        assert (targets[~mask] == END).all()
        seen += targets[mask].tolist()
    assert seen == list(range(1, count + 1))


def test_evaluation_windows_do_not_depend_on_the_batch_size():
    def sequences(batch_size):
        rows = []
        for inputs, _, mask in evaluation_batches(stream_of(50), 8, batch_size):
            rows += [row[keep].tolist() for row, keep in zip(inputs, mask, strict=True) if keep.any()]
        return rows

    assert sequences(1) == sequences(3) == sequences(100)
