from __future__ import annotations

import itertools
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from stacklm.config.schema import ParamsError, plain
from stacklm.data.batches import TrainBatches
from stacklm.data.shards import Shards
from stacklm.files import read_json, sha256
from stacklm.model.store import load_model
from stacklm.train import NotCertifiedError
from stacklm.train import pretrain as module
from stacklm.train.trainer import Prefetch
from stacklm.train.validate import validate
from support.rounding import drift
from support.train_files import MODELS, TRAIN, VOCAB, Lab, write_certificate, write_text

STEP = "stacklm.train.trainer:train_step"
IN_A_CHECKPOINT = "stacklm.train.checkpoint:save_tensors"
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
    rows = lab.rows(model)
    assert [row["step"] for row in rows] == list(range(TRAIN.max_steps + 1))
    assert [row["step"] for row in rows if "valid_loss" in row] == [0, 6, 12, 18, 24]
    assert "train_loss" not in rows[0]
    assert rows[-1]["valid_loss"] < 0.6 * rows[0]["valid_loss"]
    assert rows[-1]["tokens"] == 24 * 4 * 16
    assert rows[6]["lr"] == MODELS[model].optimizer.peak_lr
    assert rows[24]["flops"] == 24 * rows[1]["flops"]
    times = lab.rows(model, "timing.jsonl")
    assert [row["step"] for row in times] == [row["step"] for row in rows]
    assert all(later["seconds"] > earlier["seconds"] for earlier, later in itertools.pairwise(times))


def test_the_validation_loss_is_that_of_the_first_valid_tokens_of_valid(tmp_path: Path) -> None:
    lab = Lab(tmp_path)
    write_text(lab.shards)
    assert lab.run("dense", "dense") == 0
    said = lab.rows("dense")[-1]["valid_loss"]
    model, shards = load_model(lab.root / "dense" / "trained")[0].eval(), Shards.open(lab.shards)

    def loss(split: str, tokens: int) -> float:
        return validate(model, shards.split(split), shards.token_bytes, TRAIN.context_length, TRAIN.micro_batch_size, tokens).loss

    assert said == loss("valid", TRAIN.eval_tokens)
    assert said not in (loss("valid", 10**9), loss("train", TRAIN.eval_tokens))


@pytest.mark.parametrize("model", ["stacked", pytest.param("dense", marks=pytest.mark.slow)])
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
        assert lab.rows(name, "work/metrics.jsonl")[-1]["step"] == last
        assert (lab.work(name) / "checkpoints" / f"step-{last:08d}").is_dir()
    assert lab.run(name) == 0
    assert lab.result(name) == lab.result("stacked")
    times = lab.rows(name, "timing.jsonl")
    assert all(later["seconds"] > earlier["seconds"] for earlier, later in itertools.pairwise(times))


def test_a_checkpoint_of_other_settings_is_refused(lab: Lab) -> None:
    assert lab.run("changed", max_steps=8, lr_schedule="linear") == 0
    assert lab.run("changed", "dense", max_steps=9) == 1
    message = lab.log("changed")
    for change in (
        "train.max_steps was 8 and is 9",
        "train.lr_schedule was linear and is cosine",
        "model.architecture.kind was stacked and is dense",
    ):
        assert change in message


def test_a_stopped_run_goes_on_with_another_micro_batch(lab: Lab) -> None:
    """Where that is allowed, as it changes the result by rounding: in a folder of its own, and among earlier runs."""
    assert lab.run("smaller", "dense", hard_stop=13) == 0
    assert lab.run("aside", "dense", micro_batch_size=2, earlier=["smaller"]) == 0
    assert "identical run" not in lab.log("aside")
    assert lab.run("close", "dense", micro_batch_size=2, resume="compatible", earlier=["smaller"]) == 0
    assert "a checkpoint of an identical run at step 13" in lab.log("close")
    assert lab.run("smaller", "dense", micro_batch_size=2) == 1
    assert "differs from this run by rounding: train.micro_batch_size was 4 and is 2" in lab.log("smaller")
    assert lab.run("smaller", "dense", micro_batch_size=2, resume="compatible") == 0
    assert "resuming after step 13 of 24" in lab.log("smaller")
    wanted = lab.rows("dense")
    for name in ("smaller", "close"):
        rows = lab.rows(name)
        error = drift(TRAIN.max_steps, TRAIN.tokens_per_step * VOCAB)
        assert [row["train_loss"] for row in rows[1:]] == pytest.approx([row["train_loss"] for row in wanted[1:]], rel=error)


def test_a_later_stop_goes_on_where_a_finished_run_ended_to_the_bit(lab: Lab) -> None:
    assert lab.run("short", hard_stop=11) == 0
    assert lab.run("long", earlier=["short"]) == 0
    assert "a checkpoint of an identical run at step 11 (work)" in lab.log("long")
    assert lab.result("long") == lab.result("stacked")
    assert [row["goes_on_from"] for row in lab.rows("long", "timing.jsonl") if "goes_on_from" in row] == ["work, step 11"]
    assert lab.run("other", seed=2, earlier=["short"]) == 0
    assert "identical run" not in lab.log("other")


def test_a_run_that_ends_where_an_earlier_one_saved_without_validation_has_one(lab: Lab) -> None:
    """The earlier run has a checkpoint, but no validation, at step 20; the later one has both, as if it had begun again."""
    assert lab.run("passed-by", "dense", keep_checkpoints=9) == 0
    assert lab.run("fresh", "dense", hard_stop=20) == 0
    assert lab.run("adopted", "dense", hard_stop=20, earlier=["passed-by"]) == 0
    assert "a checkpoint of an identical run at step 15" in lab.log("adopted")
    assert lab.result("adopted") == lab.result("fresh")
    assert lab.run("asked-to-stop", "dense", die=(signal.SIGTERM, STEP, 20)) == 1
    assert lab.run("asked-to-stop", "dense", hard_stop=20) == 0
    assert lab.result("asked-to-stop") == lab.result("fresh")


def test_an_earlier_stop_in_a_finished_folder_is_refused_and_nothing_is_lost(lab: Lab) -> None:
    assert lab.run("finished", "dense") == 0
    assert lab.run("finished", "dense", hard_stop=12) == 1
    assert "step-00000024 is beyond this run's last step, 12: raise train.hard_stop" in lab.log("finished")
    assert lab.result("finished") == lab.result("dense")
    assert lab.run("finished", "dense") == 0
    assert lab.result("finished") == lab.result("dense")


@pytest.mark.parametrize("file", ["metrics.jsonl", "timing.jsonl"])
def test_a_log_with_rows_missing_stops_a_resume_and_is_not_adopted(lab: Lab, file: str) -> None:
    name = f"cut-{file}"
    assert lab.run(name, "dense", hard_stop=12) == 0
    log = lab.work(name) / file
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines[:5] + lines[6:]))
    assert lab.run(name, "dense") == 1
    assert f"{file}: no row of step 5, but there is a checkpoint of step 12; restore the file, or remove" in lab.log(name)
    assert lab.run(f"beside-{file}", "dense", earlier=[name]) == 0
    assert "identical run at step 12" not in lab.log(f"beside-{file}")
    assert lab.result(f"beside-{file}") == lab.result("dense")


def test_the_first_batch_is_the_first_of_the_train_split_and_each_is_seen_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[tuple[int, torch.Tensor, torch.Tensor]] = []

    def batch(batches: Prefetch, index: int, ask: Callable = Prefetch.batch) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append((index, *ask(batches, index)))
        return seen[-1][1:]

    monkeypatch.setattr(Prefetch, "batch", batch)
    shards, dense = write_text(tmp_path / "shards"), MODELS["dense"]
    certificate = write_certificate(tmp_path / "certificate.json", dense, TRAIN.context_length)
    threads = torch.get_num_threads()
    module.pretrain(replace(TRAIN, max_steps=3, warmup_steps=1), dense, shards, certificate, **untrained(tmp_path))
    torch.set_num_threads(threads)
    wanted = TrainBatches(Shards.open(shards).split("train"), TRAIN.context_length, TRAIN.global_batch_size, TRAIN.seed)
    assert [index for index, *_ in seen] == [0, 1, 2]
    assert all(torch.equal(found, due) for index, *pair in seen for found, due in zip(pair, wanted.batch(index), strict=True))
    assert read_json(tmp_path / "trained/config.json")["tokenizer"] == "5f" * 32
    state = read_json(tmp_path / "work/checkpoints/step-00000003/state.json")
    assert state["identity"]["data"] == sha256(shards / "manifest.json")
    assert state["identity"]["model"] == plain(dense)


def test_a_later_horizon_goes_on_from_the_end_of_the_plateau_to_the_bit(lab: Lab) -> None:
    """The shorter run has decayed from step 11 on, so that is where the ways part."""
    wsd = {"lr_schedule": "wsd", "decay_fraction": 0.3, "keep_checkpoints": 1}
    assert lab.run("horizon-16", **wsd, max_steps=16) == 0
    assert lab.run("horizon-24", **wsd) == 0
    assert lab.run("extended", **wsd, earlier=["horizon-16"]) == 0
    assert "a checkpoint of an identical run at step 11" in lab.log("extended")
    assert lab.result("extended") == lab.result("horizon-24")
    assert lab.run("cosine-24", earlier=["horizon-16"]) == 0
    assert "identical run" not in lab.log("cosine-24")


def untrained(folder: Path) -> dict[str, Path]:
    """Outputs of a training that does not come to be."""
    return {name: folder / name for name in ("trained", "timing", "work")}


def test_too_little_text_for_one_batch_is_refused_with_the_numbers(lab: Lab, tmp_path: Path) -> None:
    config = replace(TRAIN, context_length=900, global_batch_size=8, micro_batch_size=8)
    certificate = write_certificate(tmp_path / "certificate.json", MODELS["dense"], 900)
    with pytest.raises(ParamsError, match=r"4,000 tokens, 4 sequences of 900, but a batch takes train.global_batch_size = 8"):
        module.pretrain(config, MODELS["dense"], lab.shards, certificate, **untrained(tmp_path))


@pytest.mark.parametrize(
    ("model", "passed", "why"), [("dense", False, "says that it is not causal"), ("stacked", True, "is about another model")]
)
def test_a_model_without_a_certificate_is_not_trained(lab: Lab, tmp_path: Path, model: str, passed: bool, why: str) -> None:
    certificate = write_certificate(tmp_path / "certificate.json", MODELS[model], TRAIN.context_length, passed)
    with pytest.raises(NotCertifiedError, match=f"certificate.json {why}, so the model is not trained; run the stage"):
        module.pretrain(TRAIN, MODELS["dense"], lab.shards, certificate, **untrained(tmp_path))
    assert not (tmp_path / "work").exists()
