from __future__ import annotations

import itertools
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from train_files import MODELS, TRAIN, Lab, write_certificate

from stacklm.config.schema import ParamsError
from stacklm.files import read_jsonl
from stacklm.train import pretrain as module

STEP = "stacklm.train.trainer:update"
IN_A_CHECKPOINT = "stacklm.train.checkpoint:save_file"
BEFORE_A_CHECKPOINT = "stacklm.train.checkpoint:Checkpoints.save"
BEFORE_THE_RENAME = "os:replace"
PRUNING = "stacklm.train.checkpoint:remove"


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """Shards, with one run of each model that nothing disturbed."""
    lab = Lab(tmp_path_factory.mktemp("lab"))
    for model in MODELS:
        assert lab.run(model, model) == 0
    return lab


def test_equal_runs_leave_equal_bytes(lab: Lab) -> None:
    assert lab.run("again") == 0
    assert set(lab.result("again")) == {"config.json", "metrics.jsonl", "model.safetensors"}
    assert lab.result("again") == lab.result("stacked")
    assert lab.run("other-seed", seed=2) == 0
    assert lab.result("other-seed")["model.safetensors"] != lab.result("stacked")["model.safetensors"]


@pytest.mark.parametrize("model", MODELS)
def test_the_cycle_is_learnt_and_the_rows_tell_it(lab: Lab, model: str) -> None:
    rows = read_jsonl(lab.root / model / "trained" / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(TRAIN.steps + 1))
    assert [row["step"] for row in rows if "valid_loss" in row] == [0, 6, 12, 18, 24]
    assert "train_loss" not in rows[0]
    assert rows[-1]["valid_loss"] < 0.6 * rows[0]["valid_loss"]
    assert rows[-1]["tokens"] == 24 * 4 * 16
    assert rows[6]["lr"] == MODELS[model].optimizer.peak_lr
    assert rows[24]["flops"] == 24 * rows[1]["flops"]
    times = read_jsonl(lab.root / model / "timing.jsonl")
    assert [row["step"] for row in times] == [row["step"] for row in rows]
    assert all(later["seconds"] > earlier["seconds"] for earlier, later in itertools.pairwise(times))


@pytest.mark.parametrize("model", MODELS)
def test_a_run_killed_at_many_points_ends_in_the_same_bytes(lab: Lab, model: str) -> None:
    """The first kill is in the warm-up, before any checkpoint but that of step 0; the last ones in the decay."""
    name = f"killed-{model}"
    points = [(STEP, 3), (STEP, 9), (BEFORE_A_CHECKPOINT, 1), (IN_A_CHECKPOINT, 2), (BEFORE_THE_RENAME, 5), (PRUNING, 2), (STEP, 2)]
    for where, n in points:
        assert lab.run(name, model, die=(signal.SIGKILL, where, n)) == -signal.SIGKILL
    assert lab.run(name, model) == 0
    assert lab.result(name) == lab.result(model)
    assert lab.run(name, model) == 0  # finished, asked again: the last checkpoint has it all
    assert lab.result(name) == lab.result(model)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_after_its_step_with_a_checkpoint(lab: Lab, number: signal.Signals) -> None:
    name = f"asked-{number.name}"
    for first, last in [(1, 3), (4, 17)]:  # in the warm-up and in the decay
        assert lab.run(name, die=(number, STEP, last - first + 1)) == 1
        assert f"{number.name}: stopped after step {last} of 24; the same command resumes there" in lab.log(name)
        assert read_jsonl(lab.work(name) / "metrics.jsonl")[-1]["step"] == last
        assert (lab.work(name) / "checkpoints" / f"step-{last:08d}").is_dir()
    assert lab.run(name) == 0
    assert lab.result(name) == lab.result("stacked")
    times = read_jsonl(lab.root / name / "timing.jsonl")
    assert all(later["seconds"] > earlier["seconds"] for earlier, later in itertools.pairwise(times))


def test_the_micro_batch_changes_nothing_but_rounding(lab: Lab) -> None:
    assert lab.run("micro", "dense", micro_batch=1) == 0
    for row, whole in zip(
        read_jsonl(lab.root / "micro" / "trained" / "metrics.jsonl"),
        read_jsonl(lab.root / "dense" / "trained" / "metrics.jsonl"),
        strict=True,
    ):
        assert row == pytest.approx(whole, rel=1e-4)


def test_a_checkpoint_of_other_settings_is_refused(lab: Lab) -> None:
    assert lab.run("changed", steps=8, schedule="linear") == 0
    assert lab.run("changed", "dense", steps=9) == 1
    message = lab.log("changed")
    for change in (
        "train.steps was 8 and is 9",
        "train.schedule was linear and is cosine",
        "model.architecture.kind was stacked and is dense",
    ):
        assert change in message


def test_a_stopped_run_goes_on_with_another_micro_batch(lab: Lab) -> None:
    """In a folder of its own that is all it takes; among earlier runs it has to be asked for."""
    assert lab.run("smaller", "dense", stop_step=13) == 0
    assert lab.run("aside", "dense", micro_batch=2, earlier=["smaller"]) == 0
    assert "going on" not in lab.log("aside")
    assert lab.run("close", "dense", micro_batch=2, resume="close", earlier=["smaller"]) == 0
    assert "come to step 13 on the same way" in lab.log("close")
    assert lab.run("smaller", "dense", micro_batch=2) == 0
    assert "resuming after step 13 of 24" in lab.log("smaller")
    wanted = read_jsonl(lab.root / "dense" / "trained" / "metrics.jsonl")
    for name in ("smaller", "close"):
        rows = read_jsonl(lab.root / name / "trained" / "metrics.jsonl")
        assert [row["train_loss"] for row in rows[1:]] == pytest.approx([row["train_loss"] for row in wanted[1:]], rel=1e-4)


def test_a_later_stop_goes_on_where_a_finished_run_ended_to_the_bit(lab: Lab) -> None:
    assert lab.run("short", stop_step=11) == 0
    assert lab.run("long", earlier=["short"]) == 0
    assert "come to step 11 on the same way (work): going on" in lab.log("long")
    assert lab.result("long") == lab.result("stacked")
    assert [row["goes_on_from"] for row in read_jsonl(lab.root / "long" / "timing.jsonl") if "goes_on_from" in row] == [
        "work, step 11"
    ]
    assert lab.run("other", seed=2, earlier=["short"]) == 0
    assert "going on" not in lab.log("other")


def test_a_later_horizon_goes_on_from_the_end_of_the_plateau_to_the_bit(lab: Lab) -> None:
    """The shorter run has decayed from step 11 on, so that is where the ways part."""
    wsd = {"schedule": "wsd", "decay": 0.3, "keep_checkpoints": 1}
    assert lab.run("horizon-16", **wsd, steps=16) == 0
    assert lab.run("horizon-24", **wsd) == 0
    assert lab.run("extended", **wsd, earlier=["horizon-16"]) == 0
    assert "come to step 11 on the same way" in lab.log("extended")
    assert lab.result("extended") == lab.result("horizon-24")
    assert lab.run("cosine-24", earlier=["horizon-16"]) == 0
    assert "going on" not in lab.log("cosine-24")


def untrained(folder: Path) -> dict[str, Path]:
    """Outputs of a training that does not come to be."""
    return {name: folder / name for name in ("trained", "timing", "work")}


def test_too_little_text_for_one_batch_is_refused_with_the_numbers(lab: Lab, tmp_path: Path) -> None:
    config = replace(TRAIN, context=900, batch_size=8, micro_batch=8)
    certificate = write_certificate(tmp_path / "certificate.json", MODELS["dense"], 900)
    with pytest.raises(ParamsError, match=r"4,000 tokens, 4 windows of 900, but a batch takes train.batch_size = 8"):
        module.pretrain(config, MODELS["dense"], lab.shards, certificate, **untrained(tmp_path))


@pytest.mark.parametrize(
    ("model", "passed", "why"), [("dense", False, "says that it is not causal"), ("stacked", True, "is about another model")]
)
def test_a_model_without_a_certificate_is_not_trained(lab: Lab, tmp_path: Path, model: str, passed: bool, why: str) -> None:
    certificate = write_certificate(tmp_path / "certificate.json", MODELS[model], TRAIN.context, passed)
    with pytest.raises(module.NotCertifiedError, match=rf"certificate.json {why}, so it is not trained; run the stage `audit`"):
        module.pretrain(TRAIN, MODELS["dense"], lab.shards, certificate, **untrained(tmp_path))
    assert not (tmp_path / "work").exists()
