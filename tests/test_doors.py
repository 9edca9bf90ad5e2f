"""Two doors, one truth: `dvc repro` and `stacklm run-flow` on the real pipeline, as a user runs them."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from conftest import Checkout

from stacklm.files import sha256
from stacklm.pipeline.leaf import history

VARYING = ("out/timing", "out/report")  # times and memory: figures that differ between equal runs

EVERYTHING = [
    "inputs",
    "download",
    "tokenizer",
    "shards",
    "audit@stacked",
    "audit@dense",
    "pretrain@stacked",
    "pretrain@dense",
    "evaluate@stacked",
    "evaluate@dense",
    "compare",
]


def outputs(checkout: Checkout) -> dict[str, str]:
    """The hash of every output that must not differ between equal runs."""
    files = sorted(path for path in (checkout.root / "out").rglob("*") if path.is_file() and path.name != ".gitignore")
    names = {path.relative_to(checkout.root).as_posix(): path for path in files}
    return {name: sha256(path) for name, path in names.items() if not name.startswith(VARYING)}


def under_way(checkout: Checkout, pattern: str) -> list[Path]:
    """What trainings that have not ended keep in their work folders; those that have leave a record."""
    works = (work for work in checkout.project.state.glob("work/pretrain@*") if not (work / "record.json").exists())
    return [path for work in works for path in work.glob(pattern)]


def ran(checkout: Checkout) -> list[str]:
    """The stages that did real work so far, in order, without the one that looks at the inputs each time."""
    return [row["stage"] for row in history(checkout.project) if row["stage"] != "inputs"]


def flow(checkout: Checkout, name: str = "pretrain", **keywords) -> str:
    return checkout.stacklm("run-flow", name, **keywords)


def repro(checkout: Checkout, **keywords) -> str:
    return checkout.repro(**keywords)


DOORS = {"dvc": repro, "flow": flow}


def wait_for(condition, seconds: float = 60) -> None:
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "waited in vain"
        time.sleep(0.02)


def processes_in(checkout: Checkout) -> list[psutil.Process]:
    """Everything that still runs with this checkout as its working directory."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.cwd().startswith(str(checkout.root)) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_the_first_run_of_the_flow_makes_the_same_bytes_as_dvc_repro(finished, fresh):
    printed = flow(fresh)
    assert sorted(set(ran(fresh))) == sorted(EVERYTHING[1:])
    assert outputs(fresh) == outputs(finished)
    assert "out/report" in printed
    count = len(ran(fresh))
    assert "didn't change" in repro(fresh)
    flow(fresh)
    assert len(ran(fresh)) == count


def test_nothing_is_redone_by_either_door(checkout):
    before, made = ran(checkout), outputs(checkout)
    flow(checkout)
    repro(checkout)
    assert ran(checkout) == before
    assert outputs(checkout) == made


@pytest.mark.parametrize(("first", "second"), [("dvc", "flow"), ("flow", "dvc")])
def test_one_param_reruns_what_depends_on_it_and_reverting_restores(checkout, first, second):
    before, made = len(ran(checkout)), outputs(checkout)
    checkout.set("models.dense.optimizer.peak_lr=5e-3")
    DOORS[first](checkout)
    assert ran(checkout)[before:] == ["pretrain@dense", "evaluate@dense", "compare"]
    changed = outputs(checkout)
    assert changed["out/models/dense/model.safetensors"] != made["out/models/dense/model.safetensors"]
    assert changed["out/models/stacked/model.safetensors"] == made["out/models/stacked/model.safetensors"]
    DOORS[second](checkout)
    assert len(ran(checkout)) == before + 3
    checkout.run("git", "checkout", "-q", "params.yaml")
    DOORS[second](checkout)
    assert len(ran(checkout)) == before + 3, "the old results are in the cache"
    assert outputs(checkout) == made


@pytest.mark.parametrize("door", DOORS)
def test_a_new_entry_in_models_trains_just_that_model(checkout, door):
    before = len(ran(checkout))
    text = checkout.project.params_file.read_text()
    entry = "  small:\n    architecture: {kind: dense, width: 8, heads: 1, layers: 1, hidden: 8}\n"
    checkout.project.params_file.write_text(text.replace("models:\n", f"models:\n{entry}"))
    DOORS[door](checkout)
    assert ran(checkout)[before:] == ["audit@small", "pretrain@small", "evaluate@small", "compare"]
    assert "small" in (checkout.root / "out/comparison.json").read_text()


@pytest.mark.parametrize("door", DOORS)
def test_outputs_deleted_or_corrupted_are_restored(checkout, door):
    made, before = outputs(checkout), len(ran(checkout))
    (checkout.root / "out/tokenizer/tokenizer.json").unlink()
    (checkout.root / "out/comparison.json").unlink()
    model = checkout.root / "out/models/dense/model.safetensors"
    model.write_bytes(model.read_bytes()[:-1] + b"?")
    DOORS[door](checkout)
    assert outputs(checkout) == made
    assert len(ran(checkout)) == before, "restored from the cache, not made anew"


def test_old_outputs_brought_back_by_dvc_checkout_are_not_served(checkout):
    old = outputs(checkout)
    checkout.set("train.steps=14")
    flow(checkout)
    new, count = outputs(checkout), len(ran(checkout))
    checkout.run("git", "stash", "-q", "--", "dvc.lock")
    checkout.run("dvc", "checkout", "-q")
    assert outputs(checkout) == old
    flow(checkout)
    assert outputs(checkout) == new
    assert len(ran(checkout)) == count


@pytest.mark.parametrize(("killed", "resuming"), [("flow", "dvc"), ("dvc", "flow")])
def test_kill_minus_nine_inside_pretraining_then_the_other_door_resumes(checkout, tmp_path, killed, resuming):
    checkout.set("train.steps=500", "train.checkpoint_every=20", "train.valid_every=250")
    twin = checkout.copy(tmp_path / "twin")
    repro(twin)
    before = ran(checkout)
    command = {"flow": ["python", "-m", "stacklm", "run-flow", "pretrain"], "dvc": ["dvc", "repro"]}[killed]
    child = checkout.start(*command)
    wait_for(lambda: under_way(checkout, "checkpoints/*"), 120)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    wait_for(lambda: not processes_in(checkout), 30)
    assert ran(checkout) == before, "it was killed inside pretraining"
    printed = DOORS[resuming](checkout)
    assert "resum" in printed
    assert outputs(checkout) == outputs(twin)
    assert sorted(ran(checkout)) == sorted([*before, *ran(twin)[len(before) :]]), "nothing upstream was redone"


def test_a_kill_between_publishing_and_dvc_lock_costs_nothing(checkout):
    """The finished work folder is still there, so the stage is published again and not run again."""
    checkout.set("train.steps=14")
    checkout.stacklm("stage", "pretrain", "dense")  # what DVC runs; DVC itself never hears of it
    count = len(ran(checkout))
    repro(checkout)
    assert ran(checkout)[count:].count("pretrain@dense") == 0
    assert ran(checkout)[count:].count("pretrain@stacked") == 1


def test_both_doors_at_the_same_time(checkout):
    checkout.set("train.steps=400", "train.checkpoint_every=100", "train.valid_every=200")
    running = checkout.start("python", "-m", "stacklm", "run-flow", "pretrain")
    wait_for(lambda: under_way(checkout, "*"), 120)
    refused = checkout.repro(check=False)
    assert f"process {running.pid}" in refused
    assert running.wait(timeout=240) == 0
    count = len(ran(checkout))
    assert "didn't change" in repro(checkout)
    assert len(ran(checkout)) == count


def test_a_flow_waits_for_a_running_dvc_repro(checkout):
    checkout.set("train.steps=400", "train.checkpoint_every=100", "train.valid_every=200")
    before = len(ran(checkout))
    running = checkout.start("dvc", "repro")
    wait_for(lambda: under_way(checkout, "*"), 120)
    printed = flow(checkout)
    assert "waiting for `dvc repro`" in printed
    assert running.wait(timeout=240) == 0
    assert sorted(ran(checkout)[before:]) == sorted(EVERYTHING[6:])


def test_temporary_and_queued_experiments(checkout):
    made, before = outputs(checkout), len(ran(checkout))
    checkout.run("dvc", "exp", "run", "--temp", "-S", "train.steps=14", "-n", "longer")
    assert outputs(checkout) == made, "the checkout itself is untouched"
    assert sorted(ran(checkout)[before:]) == sorted(EVERYTHING[6:])
    checkout.run("dvc", "exp", "run", "--queue", "-S", "models.dense.architecture.hidden=24", "-n", "wider")
    checkout.run("dvc", "exp", "run", "--run-all", "-j", "1")
    wait_for(lambda: "wider" in checkout.run("dvc", "exp", "list", "--name-only"), 120)
    assert ran(checkout)[before + 5 :] == ["audit@dense", "pretrain@dense", "evaluate@dense", "compare"]
    checkout.run("dvc", "exp", "apply", "longer")
    count = len(ran(checkout))
    flow(checkout)
    assert len(ran(checkout)) == count
    assert "steps: 14" in checkout.project.params_file.read_text()


def test_a_model_that_sees_the_future_stops_the_pipeline(checkout):
    before, made = len(ran(checkout)), outputs(checkout)
    code = checkout.root / "stacklm/model/dense.py"
    assert "is_causal=True" in code.read_text()
    code.write_text(code.read_text().replace("is_causal=True", "is_causal=False"))
    printed = repro(checkout, check=False)
    assert "pairs of fresh weights: no mask, or a normalisation over time: every position sees all later tokens" in printed
    assert "the first module to let them in is `blocks.0.attention` (Attention)" in printed
    assert not {"pretrain@dense", "compare"} & set(ran(checkout)[before:])
    assert outputs(checkout)["out/models/dense/model.safetensors"] == made["out/models/dense/model.safetensors"]


def test_lost_cache_and_outputs_are_recomputed_to_the_same_bytes(checkout):
    made = outputs(checkout)
    checkout.run("rm", "-rf", "out", ".dvc/cache", ".stacklm")
    repro(checkout)
    assert outputs(checkout) == made


def test_a_moved_project_still_has_nothing_to_do(checkout, tmp_path: Path):
    flow(checkout)
    moved = Checkout(checkout.root.rename(tmp_path / "moved"))
    count = len(ran(moved))
    flow(moved)
    assert len(ran(moved)) == count


def test_status_says_what_is_stale_and_why(checkout):
    assert "Everything is up to date" in checkout.stacklm("status")
    checkout.set("train.steps=14", "tokenizer.min_frequency=3")
    (checkout.root / "out/comparison.json").unlink()
    lines = {line.split()[0]: line for line in checkout.stacklm("status").splitlines() if line}
    assert "min_frequency" in lines["tokenizer"] and "default -> 3" in lines["tokenizer"]
    assert "steps 12 -> 14" in lines["pretrain@dense"] and "shards" in lines["pretrain@dense"]
    assert "out/comparison.json is missing" in lines["compare"]
    assert "up to date" in lines["download"]


def test_changed_files_outside_the_project_are_seen(fresh, tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for i in range(60):
        (corpus / f"{i}.txt").write_text(f"document {i} says {i * i} in many words\n" * 20)
    text = fresh.project.params_file.read_text()
    fresh.project.params_file.write_text(
        text.replace("{kind: stdlib, max_bytes: 400_000}", f"{{kind: files, paths: ['{corpus}/*.txt']}}")
    )
    repro(fresh)
    count, before = len(ran(fresh)), outputs(fresh)
    (corpus / "7.txt").write_text("something else entirely, and more of it\n" * 20)
    assert "source's files changed" in fresh.stacklm("status")
    repro(fresh)
    assert ran(fresh)[count:][:1] == ["download"]
    assert outputs(fresh)["out/documents/record.json"] != before["out/documents/record.json"]


@pytest.mark.parametrize("door", DOORS)
def test_wrong_settings_stop_every_command_before_any_work(checkout, door):
    text = checkout.project.params_file.read_text()
    checkout.project.params_file.write_text(text.replace("steps: 12", "stepz: 12"))
    printed = DOORS[door](checkout, check=False)
    assert "train.stepz" in printed and "did you mean `steps`?" in printed
    assert outputs(checkout)
    for command in (["status"], ["params"], ["stage", "shards"]):
        done = subprocess.run(
            ["python", "-m", "stacklm", *command], cwd=checkout.root, env=checkout.environment, capture_output=True, text=True
        )
        assert done.returncode == 2
        assert "did you mean `steps`?" in done.stderr
