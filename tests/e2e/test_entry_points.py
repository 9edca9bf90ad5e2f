"""Two entry points with the same results: `dvc repro` and `stacklm run-flow` on the real pipeline."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import psutil
import pytest

from stacklm.files import read_json, sha256
from stacklm.pipeline.locks import hold_project
from stacklm.pipeline.runner import history
from support import edit, wait_for
from support.checkout import Checkout
from support.flows_project import EVERYTHING

VARYING = ("out/timing", "out/speed")  # times and memory: figures that differ between equal runs


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


def flow(checkout: Checkout) -> str:
    return checkout.stacklm("run-flow", "pretrain")


ENTRY_POINTS = {"dvc": Checkout.repro, "flow": flow}


def add_model(checkout: Checkout) -> None:
    small = "  small:\n    architecture: {kind: dense, d_model: 8, n_heads: 1, n_layers: 1, d_ff: 8}\n"
    edit(checkout.root / "params.yaml", "models:\n", f"models:\n{small}")


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


@pytest.mark.slow
def test_the_first_run_of_the_flow_makes_the_same_bytes_as_dvc_repro(finished, fresh):
    printed = flow(fresh)
    assert sorted(set(ran(fresh))) == sorted(EVERYTHING[1:])
    assert outputs(fresh) == outputs(finished)
    assert "out/report" in printed
    count = len(ran(fresh))
    assert "didn't change" in fresh.repro()
    flow(fresh)
    assert len(ran(fresh)) == count


def test_nothing_is_redone_by_either_entry_point_after_a_move_and_changes_of_code_that_change_no_result(checkout, tmp_path):
    checkout = Checkout(checkout.root.rename(tmp_path / "moved"), **checkout.extra)
    before, made = ran(checkout), outputs(checkout)
    tracked = (checkout.root / "dvc.lock").read_text()
    assert "out/report" in tracked and not [path for path in VARYING if path in tracked]
    edit(checkout.root / "stacklm/__init__.py", '__version__ = "', '__version__ = "1')
    trainer = checkout.root / "stacklm/train/trainer.py"
    edit(trainer, '"""One optimizer step', '"""A step')
    edit(trainer, "def train_step(run: Run, step: int", "# a comment\ndef train_step(run, step: float")
    edit(checkout.root / "stacklm/plan/text.py", "\n\n\n", "\n\n\nUNUSED = 1  # in a module that no stage imports\n\n\n")
    assert checkout.cli("status", "--quiet") == ""
    flow(checkout)
    checkout.repro()
    assert ran(checkout) == before
    assert outputs(checkout) == made


def test_a_change_of_code_is_named_and_may_be_accepted(checkout):
    before, made = ran(checkout), outputs(checkout)
    edit(checkout.root / "stacklm/train/trainer.py", "run.batches.batch(step - 1)", "run.batches.batch(step - 2 + 1)")
    assert "nothing to accept" in checkout.cli("accept", "shards", "--reason", "none", code=2)
    assert "since it checks the current state" in checkout.cli("accept", "audit", "--reason", "none", code=2)
    said = status(checkout)
    changed = "stacklm/train/trainer.py train_step changed"
    assert said["pretrain@dense-1"] == said["pretrain@stacked-1"] == f"will run: {changed}"
    assert {said[name] for name in EVERYTHING[:6]} == {"up to date"}
    assert verdicts(said) == dict.fromkeys(EVERYTHING[6:], "run")
    checkout.repro("download")  # what was recorded is still known when out/code holds the present code
    assert status(checkout) == said
    assert checkout.cli("accept", "pretrain", "--reason", "the same number").count(f"accepted by hand: {changed}") == 2
    assert set(status(checkout).values()) == {"up to date"}
    checkout.repro()
    assert ran(checkout) == before
    record = read_json(checkout.root / "out/records/pretrain@dense-1.json")
    (note,) = record["accepted"]
    assert (note["reason"], note["changed"]) == ("the same number", [changed.removesuffix(" changed")])
    assert note["code"] != record["code"]
    assert {name for name, digest in outputs(checkout).items() if made[name] != digest} == {
        *("out/code/lab.json", "out/code/pretrain.json"),
        *("out/records/pretrain@dense-1.json", "out/records/pretrain@stacked-1.json"),
    }
    checkout.set("train.max_steps=14")
    assert "more than its code changed" in checkout.cli("accept", "pretrain@dense-1", "--reason", "none", code=2)


@pytest.mark.parametrize(("first", "second"), [("dvc", "flow"), pytest.param("flow", "dvc", marks=pytest.mark.slow)])
def test_one_param_reruns_what_depends_on_it_and_reverting_restores(checkout, first, second):
    before, made = len(ran(checkout)), outputs(checkout)
    checkout.set("models.dense.optimizer.peak_lr=5e-3")
    said = status(checkout)
    assert said["audit@dense"] == said["evaluate@stacked-1"] == "up to date"
    assert said["pretrain@dense-1"] == "will run: models.dense: .optimizer default -> {'peak_lr': 0.005}"
    assert said["evaluate@dense-1"] == "will run: upstream pretrain@dense-1 is stale"
    checkout.cli("status", "--quiet", code=1)
    if first == "dvc":  # as if killed between publishing and dvc.lock: the finished work is published again
        checkout.stacklm("stage", "pretrain", "dense", "1")
    ENTRY_POINTS[first](checkout)
    assert ran(checkout)[before:] == ["pretrain@dense-1", "evaluate@dense-1", "compare"]
    changed = outputs(checkout)
    assert changed["out/models/dense-1/model.safetensors"] != made["out/models/dense-1/model.safetensors"]
    assert changed["out/models/stacked-1/model.safetensors"] == made["out/models/stacked-1/model.safetensors"]
    checkout.run("git", "checkout", "-q", "params.yaml")
    ENTRY_POINTS[second](checkout)
    assert len(ran(checkout)) == before + 3, "the old results are in the cache"
    assert outputs(checkout) == made


@pytest.mark.slow
def test_a_new_entry_in_models_trains_just_that_model(checkout):
    """By a flow; `test_status_foretells_what_dvc_runs_and_what_it_restores` has `dvc repro`."""
    before = len(ran(checkout))
    add_model(checkout)
    flow(checkout)
    assert ran(checkout)[before:] == ["audit@small", "pretrain@small-1", "evaluate@small-1", "compare"]
    assert "small" in (checkout.root / "out/comparison.json").read_text()


@pytest.mark.parametrize("entry_point", ["dvc", pytest.param("flow", marks=pytest.mark.slow)])
def test_outputs_deleted_or_corrupted_are_restored(checkout, entry_point):
    made, before = outputs(checkout), len(ran(checkout))
    (checkout.root / "out/tokenizer/tokenizer.json").unlink()
    (checkout.root / "out/comparison.json").unlink()
    model = checkout.root / "out/models/dense-1/model.safetensors"
    model.write_bytes(model.read_bytes()[:-1] + b"?")
    assert "out/comparison.json is missing" in status(checkout)["compare"]
    ENTRY_POINTS[entry_point](checkout)
    assert outputs(checkout) == made
    assert len(ran(checkout)) == before, "restored from the cache, not recomputed"


@pytest.mark.slow
def test_old_outputs_brought_back_by_dvc_checkout_are_not_served(checkout):
    old = outputs(checkout)
    checkout.set("train.max_steps=14")
    flow(checkout)
    new, count = outputs(checkout), len(ran(checkout))
    checkout.run("git", "stash", "-q", "--", "dvc.lock")
    checkout.run("dvc", "checkout", "-q")
    assert outputs(checkout) == old
    flow(checkout)
    assert outputs(checkout) == new
    assert len(ran(checkout)) == count


@pytest.mark.slow
@pytest.mark.parametrize(("killed", "resuming"), [("flow", "dvc"), ("dvc", "flow")])
def test_kill_minus_nine_inside_pretraining_then_the_other_resumes(checkout, tmp_path, killed, resuming):
    checkout.set("train.max_steps=500", "train.checkpoint_every=20", "train.eval_every=250")
    twin = checkout.copy(tmp_path / "twin")
    twin.repro()
    before = ran(checkout)
    command = {"flow": ["python", "-m", "stacklm", "run-flow", "pretrain"], "dvc": ["dvc", "repro"]}[killed]
    child = checkout.start(*command)
    wait_for(lambda: under_way(checkout, "checkpoints/*"), 120)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    wait_for(lambda: not processes_in(checkout), 30)
    assert ran(checkout) == before, "it was killed inside pretraining"
    printed = ENTRY_POINTS[resuming](checkout)
    assert "resum" in printed
    assert outputs(checkout) == outputs(twin)
    assert sorted(ran(checkout)) == sorted([*before, *ran(twin)[len(before) :]]), "nothing upstream was redone"


def assert_dvc_is_refused(checkout: Checkout, all_stages: str, tokenizer: str) -> None:
    """With these words, for all stages and for the tokenizer alone."""
    before = outputs(checkout)
    for arguments, words in (([], all_stages), (["--single-item", "--force", "tokenizer"], tokenizer)):
        refused = checkout.repro(*arguments, code=255)
        assert words in refused
        assert outputs(checkout) == before, "what DVC deletes before it runs a stage is back"


def test_dvc_repro_is_refused_while_a_flow_works_and_nothing_is_lost(checkout):
    """The lock is what a flow holds while it runs; `test_both_entry_points_at_the_same_time` has a flow that trains."""
    with hold_project(checkout.project, "flow pretrain", wait=True):
        assert_dvc_is_refused(checkout, *[f"flow pretrain (process {os.getpid()}) works on this project"] * 2)


@pytest.mark.slow
def test_both_entry_points_at_the_same_time(checkout):
    checkout.set("train.max_steps=4000", "train.checkpoint_every=1000", "train.eval_every=1000")
    running = checkout.start("python", "-m", "stacklm", "run-flow", "pretrain")
    both = min(2, os.cpu_count() or 1)  # models that train at once: DVC deletes the outputs of a stage that it begins
    wait_for(lambda: len(under_way(checkout, "checkpoints")) == both, 120)
    # A stage that trains reads what `inputs` writes, which DVC's own lock refuses before the stage can say who works here.
    held = f"flow pretrain (process {running.pid}) works on this project"
    assert_dvc_is_refused(checkout, "it is being blocked by:", held)
    assert running.wait(timeout=600) == 0
    count = len(ran(checkout))
    assert "didn't change" in checkout.repro()
    assert len(ran(checkout)) == count


@pytest.mark.slow
def test_a_flow_waits_for_a_running_dvc_repro(checkout):
    checkout.set("train.max_steps=400", "train.checkpoint_every=100", "train.eval_every=200")
    before = len(ran(checkout))
    running = checkout.start("dvc", "repro")
    wait_for(lambda: under_way(checkout, "*"), 120)
    printed = flow(checkout)
    assert "waiting for `dvc repro`" in printed
    assert running.wait(timeout=240) == 0
    assert sorted(ran(checkout)[before:]) == sorted(EVERYTHING[6:])


@pytest.mark.slow
def test_temporary_and_queued_experiments(checkout):
    made, before = outputs(checkout), len(ran(checkout))
    checkout.run("dvc", "exp", "run", "--temp", "-S", "train.max_steps=14", "-n", "longer")
    assert outputs(checkout) == made, "the checkout itself is untouched"
    assert sorted(ran(checkout)[before:]) == sorted(EVERYTHING[6:])
    checkout.run("dvc", "exp", "run", "--queue", "-S", "models.dense.architecture.d_ff=24", "-n", "wider")
    checkout.run("dvc", "exp", "run", "--run-all", "-j", "1")
    wait_for(lambda: "wider" in checkout.run("dvc", "exp", "list", "--name-only"), 120)
    assert ran(checkout)[before + 5 :] == ["audit@dense", "pretrain@dense-1", "evaluate@dense-1", "compare"]
    checkout.run("dvc", "exp", "apply", "longer")
    count = len(ran(checkout))
    flow(checkout)
    assert len(ran(checkout)) == count
    assert "max_steps: 14" in checkout.project.params_file.read_text()


def test_a_model_that_sees_the_future_stops_the_pipeline(checkout):
    before, made = len(ran(checkout)), outputs(checkout)
    edit(checkout.root / "stacklm/model/dense.py", "is_causal=True", "is_causal=False")
    printed = checkout.repro("pretrain@dense-1", code=255)
    assert "pairs of briefly trained weights: no mask, or a normalisation over time: " in printed
    assert "every position sees all later tokens" in printed
    assert "the first module to let them in is `blocks.0.attention` (Attention)" in printed
    assert ran(checkout)[before:] == []
    assert outputs(checkout)["out/models/dense-1/model.safetensors"] == made["out/models/dense-1/model.safetensors"]


@pytest.mark.slow
def test_lost_cache_and_outputs_are_recomputed_to_the_same_bytes(checkout):
    made = outputs(checkout)
    checkout.run("rm", "-rf", "out", ".dvc/cache", ".stacklm")
    checkout.repro()
    assert outputs(checkout) == made


def status(checkout: Checkout) -> dict[str, str]:
    """What `stacklm status` says of each stage, asked in a subdirectory."""
    (checkout.root / "notes").mkdir(exist_ok=True)
    printed = checkout.cli("status", folder="notes")
    return {line.split()[0]: line.partition(" ")[2].strip() for line in printed.partition("\n\n")[0].splitlines()}


@pytest.mark.slow
def test_status_foretells_what_dvc_runs_and_what_it_restores(checkout):
    text = checkout.project.params_file.read_text()
    add_model(checkout)
    expected = {"audit@small": "run", "pretrain@small-1": "run", "evaluate@small-1": "run", "compare": "run"}
    assert verdicts(status(checkout)) == expected
    assert done(checkout.repro()) == expected
    checkout.project.params_file.write_text(text)
    assert verdicts(status(checkout)) == done(checkout.repro()) == {"compare": "run"}
    checkout.set("train.max_steps=14")
    assert verdicts(status(checkout)) == done(checkout.repro()) == {f"{name}": "run" for name in EVERYTHING[4:]}
    checkout.project.params_file.write_text(text)
    expected = {name: "restore" for name in EVERYTHING[4:]}
    assert verdicts(status(checkout)) == expected
    (checkout.root / "out/tokenizer/tokenizer.json").unlink()
    (checkout.root / "out/inputs.json").unlink()
    assert status(checkout)["inputs"] == "will run, with the same outputs: its outputs are missing or changed"
    assert done(checkout.repro()) == expected | {"tokenizer": "restore"}


def verdicts(said: dict[str, str]) -> dict[str, str]:
    """The stages that are not up to date, without the one that looks at the inputs each time."""
    words = {"will run": "run", "will be restored from the cache": "restore"}
    return {
        name: words.get(text.partition(":")[0], text) for name, text in said.items() if text != "up to date" and name != "inputs"
    }


def done(printed: str) -> dict[str, str]:
    """What `dvc repro` says that it did."""
    found = re.findall(r"^(Running s|S)tage '(\S+)'(:| is cached)", printed, re.MULTILINE)
    return {name: "run" if how == "Running s" else "restore" for how, name, _ in found if name != "inputs"}


def test_changed_files_outside_the_project_are_seen(fresh, tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for i in range(60):
        (corpus / f"{i}.txt").write_text(f"document {i} says {i * i} in many words\n" * 20)
    edit(fresh.root / "params.yaml", "{kind: stdlib, max_bytes: 400_000}", f"{{kind: files, paths: ['{corpus}/*.txt']}}")
    fresh.repro("download")
    before = outputs(fresh)
    (corpus / "7.txt").write_text("something else entirely, and more of it\n" * 20)
    assert "source's files changed" in fresh.cli("status")
    fresh.repro("download")
    assert ran(fresh) == ["download", "download"]
    assert outputs(fresh)["out/documents/record.json"] != before["out/documents/record.json"]


def test_wrong_settings_stop_every_command_before_any_work(checkout):
    edit(checkout.root / "params.yaml", "max_steps: 12", "max_stepz: 12")
    for printed in (checkout.repro(code=255), checkout.cli("run-flow", "pretrain", code=2)):
        assert "train.max_stepz" in printed and "did you mean `max_steps`?" in printed
    assert outputs(checkout)
