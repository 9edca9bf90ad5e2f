from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from stacklm.config.optimizer import Adafactor, AdamW, Muon, Optimizer, Rest
from stacklm.config.schema import ParamsError
from stacklm.data import DataError
from stacklm.files import read_json, read_jsonl, sha256
from stacklm.report.lr_find import describe, record
from stacklm.train import NonFiniteError
from stacklm.train.lr_find import MARGIN, RangeTest, lr_find, peak_lrs, smooth
from stacklm.train.pretrain import pretrain
from support.rounding import drift, rounding
from support.train_files import MODELS, TRAIN, VOCAB, write_certificate, write_cycle

TOKENS = TRAIN.tokens_per_step


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cycle(tmp_path_factory.mktemp("cycle") / "shards")


def find(shards: Path, model: str = "dense", low: float = 1e-4, high: float = 10.0, steps: int = 60) -> RangeTest:
    return lr_find(model, TRAIN, MODELS[model], shards, low, high, steps)


@pytest.mark.parametrize("model", MODELS)
def test_the_rate_rises_evenly_until_the_loss_does(shards: Path, model: str) -> None:
    """From where nothing is learnt, over where the cycle is, to where the model comes apart."""
    test = find(shards, model)
    assert test.lrs[0] == 1e-4
    step = pytest.approx((10 / 1e-4) ** (1 / 59), rel=rounding(torch.float64, 60))
    assert all(b / a == step for a, b in zip(test.lrs, test.lrs[1:], strict=False))
    assert test.losses[0] == pytest.approx(math.log(16), abs=0.1)  # logits start small
    assert "had risen" in test.ended and len(test.lrs) == len(test.losses) < 60
    assert min(test.losses) < 0.8 * test.losses[0]
    assert test.smoothed[-1] > test.smoothed[test.best]
    assert 1e-3 < test.lrs[test.best] < 1
    assert test.suggestion == pytest.approx(test.lrs[test.best] / MARGIN, rel=0.05)  # two digits
    assert test.caveat is None


def test_equal_tests_are_equal_and_the_present_rate_does_not_matter(shards: Path) -> None:
    """Dropout draws, so the stacked model would tell."""
    first, again = (find(shards, "stacked", high=0.1, steps=8) for _ in range(2))
    assert first == again
    faster = replace(MODELS["stacked"], optimizer=replace(MODELS["stacked"].optimizer, peak_lr=0.5))
    assert lr_find("faster", TRAIN, faster, shards, 1e-4, 0.1, 8).losses == pytest.approx(
        first.losses, rel=drift(8, TOKENS * VOCAB)
    )


def test_updates_are_those_of_training(shards: Path, tmp_path: Path) -> None:
    """With a rate that hardly rises: the same losses, step by step, as of a training at that rate.

    Of the cycle every sequence is the same, so its validation judges by the same text.
    """
    config = replace(
        TRAIN, max_steps=5, warmup_steps=0, lr_schedule="wsd", decay_fraction=0.01, eval_every=1, eval_tokens=TRAIN.tokens_per_step
    )
    pretrain(
        config,
        MODELS["stacked"],
        shards,
        write_certificate(tmp_path / "certificate.json", MODELS["stacked"], config.context_length, config=config),
        **{"trained": tmp_path / "trained", "timing": tmp_path / "timing.jsonl", "work": tmp_path / "work"},
    )
    trained = [row["valid_loss"] for row in read_jsonl(tmp_path / "trained/metrics.jsonl")[1:]]
    test = find(shards, "stacked", low=1e-2, high=1e-2 * (1 + 1e-9), steps=5)
    assert test.losses == pytest.approx(trained, rel=drift(5, TOKENS * VOCAB))


def test_a_rate_that_breaks_the_numbers_ends_the_test(shards: Path) -> None:
    test = find(shards, high=1e38, steps=20)
    assert all(map(math.isfinite, test.losses))
    assert len(test.lrs) == len(test.losses) < 20


def test_a_range_that_says_nothing_is_told(shards: Path) -> None:
    falling = find(shards, high=2e-4, steps=5)
    assert falling.ended == "the whole range"
    assert falling.caveat.startswith("the loss still fell at 2.0e-04")
    late = RangeTest(lrs=[0.1, 0.2, 0.4], losses=[1.0, 2.0, 3.0], smoothed=[1.5, 2.0, 2.5], ended="")
    assert late.caveat.startswith("the suggestion is below 1.0e-01")


def test_what_is_no_range_is_refused(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ParamsError, match=r"0 < low < high, not 0\.1 and 0\.01"):
        find(shards, low=0.1, high=0.01)
    with pytest.raises(ParamsError, match="at least 2 updates, not 1"):
        find(shards, steps=1)
    with pytest.raises(DataError, match="run the stage `shards`"):
        find(tmp_path)


def test_a_range_above_all_sense_is_an_error(shards: Path) -> None:
    with pytest.raises(NonFiniteError, match=r"first update, at 1\.0e\+37, .* begin lower"):
        find(shards, "stacked", low=1e37, high=1e38)


def test_a_peak_of_its_own_keeps_its_proportion() -> None:
    assert peak_lrs(AdamW(peak_lr=1e-3), 4e-3) == {"peak_lr": 4e-3}
    assert peak_lrs(Muon(peak_lr=1e-3, adamw=Rest(peak_lr=5e-4)), 4e-3) == {"peak_lr": 4e-3, "adamw.peak_lr": 2e-3}


@pytest.mark.parametrize("optimizer", [Muon(peak_lr=1e-2), Adafactor(), AdamW(optimizer_in_backward=True)])
def test_every_optimizer_can_be_tested(shards: Path, optimizer: Optimizer) -> None:
    model = replace(MODELS["dense"], optimizer=optimizer)
    test = lr_find("dense", replace(TRAIN, max_grad_norm=None), model, shards, 1e-4, 10.0, 40)
    assert min(test.losses) < 0.9 * test.losses[0]


def test_smoothing_is_a_mean_over_neighbours_that_moves_no_valley() -> None:
    valley = [abs(i - 20) / 10 for i in range(50)]
    smoothed = smooth(valley, 3.0)
    assert smoothed.index(min(smoothed)) == 20
    assert smoothed[0] < valley[0] and smoothed[20] > 0
    assert smoothed[35] == pytest.approx(valley[35], abs=math.erfc(14 / 3 / 2**0.5))  # kink and end are 14 away
    assert smooth([2.0, 2.0], 1.0) == pytest.approx([2.0, 2.0])
    near = math.exp(-0.5)
    assert smooth([1.0, 3.0], 1.0)[0] == pytest.approx((1 + 3 * near) / (1 + near))


def test_the_record_is_the_same_bytes_for_equal_tests_and_says_all(tmp_path: Path) -> None:
    lrs = [1e-4 * 10 ** (i / 10) for i in range(31)]
    losses = [3 - 2 * math.exp(-((math.log10(lr) + 2) ** 2)) for lr in lrs]
    test = RangeTest(lrs, losses, smooth(losses, 1.0), "the whole range")
    for folder in (tmp_path / "a", tmp_path / "b"):
        record(test, TRAIN, MODELS["dense"], folder, "dense")
    assert sha256(tmp_path / "a") == sha256(tmp_path / "b")
    assert (tmp_path / "a/dense.svg").read_bytes().startswith(b"<?xml")
    data = read_json(tmp_path / "a/dense.json")
    assert data["suggestion"] == test.suggestion and data["settings"]["model"]["optimizer"]["peak_lr"] == 1e-2
    assert [update["loss"] for update in data["updates"]] == losses
    text = describe(test, TRAIN, MODELS["dense"], "dense")
    assert f"models.dense.optimizer.peak_lr = {test.suggestion:.1e} (params.yaml has 1.0e-02)" in text
    rows = [line for line in text.splitlines() if "*" in line]
    assert len(rows) == 24 and sum("suggestion" in row for row in rows) == 1
    assert len(max(rows, key=len)) < 100
