"""`stacklm try` with made-up scores instead of training runs: what it keeps, refuses, prints and returns."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stacklm.config.model import Dense
from stacklm.files import read_json, write_json
from stacklm.lab.experiment import load_experiment
from stacklm.pipeline import gate
from stacklm.pipeline.lab import Files
from support import edit
from support.checkout import TINY_PARAMS, Checkout, write_project
from support.custom_models import written
from support.train_files import write_text

audited = gate.audited
TERMS = ("--rates", "3", "--looks", "3,4")
TRY = ("try", "stacked", *TERMS)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Checkout:
    """One in which a model that is not dense is so much worse, with so much noise, as the file `true.json` says."""
    write_project(tmp_path, TINY_PARAMS.replace("vocab_size: 300", "vocab_size: 257"))
    write_text(tmp_path / "out" / "shards")
    (tmp_path / "trained.txt").touch()
    tell(tmp_path, 0.0, 0.1)
    made_up(monkeypatch.setattr)
    return Checkout(tmp_path)


def made_up(replace: Callable[[str, Any], None]) -> None:
    """Trials have scores without training, and nothing is audited."""

    def apart(trial, shards, work):
        root = shards.parents[1]
        with (root / "trained.txt").open("a") as file:
            print(trial.identity, file=file)
        true, noise = read_json(root / "true.json")
        seed, mine = trial.train.seed, not isinstance(trial.model.architecture, Dense)
        bits = 2 + 0.02 * random.Random(seed).gauss(0, 1) + abs(trial.model.optimizer.peak_lr - 1e-3)
        scores = {"bits_per_byte": bits * (1 + mine * (true + noise * random.Random(-seed).gauss(0, 1))), "documents": 3}
        return {"identity": trial.identity, **trial.facts, "valid": scores, "test": scores, "seconds": 2.0, "flops": 10**9}

    replace("stacklm.pipeline.trials.run_apart", apart)
    replace("stacklm.pipeline.gate.audited", lambda files, lab: "audit: not of made-up tokens")


def tell(root: Path, true: float, noise: float) -> None:
    write_json(root / "true.json", [true, noise])


def trained(project: Checkout) -> list[str]:
    return (project.root / "trained.txt").read_text().split()


def last_line(printed: str) -> dict:
    return json.loads(printed.splitlines()[-1])


@pytest.mark.parametrize(("true", "code", "verdict"), [(-0.04, 0, "better"), (0.0, 3, "not worse"), (0.04, 4, "worse")])
def test_the_exit_code_and_the_json_say_the_verdict(project, true, code, verdict):
    tell(project.root, true, 0.001)
    found = last_line(project.cli(*TRY, "--json", code=code))
    assert (found["verdict"], found["exit_code"], found["experiment"], found["attempt"]) == (verdict, code, "try-stacked", 1)
    assert found["low"] < found["mean"] < found["high"] and found["seeds"] == 3 and found["look"] == 1
    assert Path(found["report"]).is_file() and found["sentence"] in project.cli(*TRY, code=code)
    assert verdict in project.cli("lab", "show", "try-stacked")


def test_it_stops_after_a_look_and_the_same_command_goes_on_where_it_is_told_to(project):
    first = project.cli(*TRY, code=5)
    assert "3 seeds [" in first and "stacked: " in first and "would probably decide" in first
    count = len(trained(project))
    assert last_line(project.cli(*TRY, "--json", code=5))["look"] == 1 and len(trained(project)) == count
    found = last_line(project.cli(*TRY, "--seeds", "4", "--json", code=5))
    assert (found["look"], found["seeds"], len(trained(project))) == (2, 4, count + 2)
    assert "all 4 declared seeds are used" in found["sentence"]
    assert "--seeds 6: verdicts are computed after 3, 4 seeds" in project.cli(*TRY, "--seeds", "6", code=2)


def test_another_model_of_that_name_is_not_mixed_with_the_one_before(project):
    project.cli(*TRY, code=5)
    before = Files(project.project, "try-stacked")
    old, records = before.file.read_text(), sorted(path.name for path in before.record("x").parent.iterdir())
    other = (*TRY, "--set", "architecture.n_heads=4")
    said = project.cli(*other, code=2)
    assert "try-stacked was started before candidates.stacked.model.architecture.n_heads changed: --again starts over" in said
    assert before.file.read_text() == old

    assert last_line(project.cli(*other, "--again", "--json", code=5))["attempt"] == 2
    kept = Files(project.project, "try-stacked-old1")
    assert kept.file.read_text() == old and sorted(path.name for path in kept.record("x").parent.iterdir()) == records
    assert load_experiment(before.file).seeds.judge == (1, 2, 3, 4)  # the same as before: this model has not been seen on them
    assert len(trained(project)) == len({*trained(project)})  # the baseline's trials serve both
    assert "no verdict" in project.cli("lab", "show", "try-stacked-old1")
    assert "attempt 2 of try-stacked: the error rate is that of each" in project.cli(*other, code=5)


def test_again_without_a_change_judges_on_fresh_seeds(project):
    project.cli(*TRY, "--yes", code=5)
    project.cli(*TRY, "--again", code=5)
    assert load_experiment(Files(project.project, "try-stacked").file).seeds.judge == (5, 6, 7, 8)
    more = ("try", "stacked", "--rates", "3", "--looks", "3,6")
    assert "before seeds.judge, seeds.looks changed" in project.cli(*more, code=2)
    project.cli(*more, "--again", code=5)
    assert load_experiment(Files(project.project, "try-stacked").file).seeds.judge == tuple(range(11, 17))
    project.cli("try", "stacked", "--looks", "3", "--name", "other", code=5)  # nor at other rates, under another name
    assert load_experiment(Files(project.project, "try-other").file).seeds.judge == (16, 17, 18)


def test_other_tokens_begin_another_gate(project):
    project.cli(*TRY, code=5)
    write_text(project.root / "out" / "shards", train=np.resize(np.array([1, 2, 0], dtype="<u2"), 900))
    assert "before its tokens changed: --again starts over" in project.cli(*TRY, code=2)


def test_a_file_is_kept_as_it_was_tried_and_only_a_change_of_its_code_begins_again(project):
    file, command = project.root / "mine.py", ("try", "mine.py", *TERMS)
    written(project.root)
    project.cli(*command, code=5)
    (first,) = (project.root / "experiments" / "sources").glob("mine-*/mine.py")
    assert first.read_text() == file.read_text()
    count = len(trained(project))
    file.write_text(f"# my own\n{file.read_text()}")
    project.cli(*command, code=5)
    assert len(trained(project)) == count and "# my own" not in first.read_text()

    edit(file, "x.cumsum(1)", "x.cumsum(1) / 2")
    assert "try-mine was started before mine.py Mine.mix changed: --again" in project.cli(*command, code=2)
    project.cli(*command, "--again", code=5)
    file.unlink()
    for name, seeds in (("try-mine", "3 seeds"), ("try-mine-old1", "3 seeds")):
        assert seeds in project.cli("lab", "show", name)
    assert len([*(project.root / "experiments" / "sources").iterdir()]) == 2


def test_a_model_that_sees_the_future_is_refused_before_any_training_and_can_be_mended(project, monkeypatch):
    monkeypatch.setattr(gate, "audited", audited)
    written(project.root, ("x.cumsum(1)", "x.flip(1).cumsum(1)"))
    command = ("try", "mine.py", *TERMS)
    assert "not certified as causal" in project.cli(*command, code=2) and not trained(project)
    written(project.root)
    assert "mine passed all" in project.cli(*command, code=5)  # nothing had been found that could be lost


def test_at_equal_time_steps_follow_from_the_speeds(project, monkeypatch):
    monkeypatch.setattr("stacklm.pipeline.lab.seconds_per_step", lambda *_: {"baseline 1": 1.0, "stacked 1": 1.5})
    found = last_line(project.cli(*TRY, "--budget", "seconds", "--json", code=5))
    origin = read_json(Files(project.project, "try-stacked").origin)
    assert found["held_equal"] == "seconds" and {*origin["speeds"]} == {"baseline 1", "stacked 1"}
    assert last_line(project.cli(*TRY, "--budget", "seconds", "--seeds", "4", "--json", code=5))["seeds"] == 4


def test_short_trainings_and_a_name_of_its_own(project):
    found = last_line(project.cli(*TRY, "--steps", "5", "--name", "short", "--json", code=5))
    assert found["experiment"] == "try-short"
    made = load_experiment(Files(project.project, "try-short").file)
    assert made.train == {"max_steps": 5, "hard_stop": None, "warmup_steps": 0}
    assert "dense is the baseline itself" in project.cli("try", "dense", code=2)
    for looks in ("3;4", "", "2,3", "3,3", "5,3"):
        assert f"--looks {looks!r}: write increasing numbers" in project.cli("try", "stacked", "--looks", looks, code=2)


@pytest.mark.skipif(os.name == "nt", reason="there is no pseudo-terminal on Windows")
@pytest.mark.parametrize(("key", "looks"), [("\n", 2), pytest.param("q\n", 1, marks=pytest.mark.slow)])
def test_on_a_terminal_enter_goes_on(project, key, looks):
    code = (
        "import sys; from test_gate import made_up; from stacklm import cli; from pkgutil import resolve_name\n"
        "made_up(lambda name, value: setattr(resolve_name(name.rpartition('.')[0]), name.rpartition('.')[2], value))\n"
        f"sys.argv = {['stacklm', *TRY]}; cli.main()"
    )
    master, terminal = os.openpty()
    paths = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]), "COLUMNS": "300"}
    running = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=project.root,
        env={**project.environment, **paths},
        stdin=terminal,
        stdout=terminal,
        stderr=subprocess.DEVNULL,
    )
    os.close(terminal)
    printed = ""
    while "anything else stops: " not in printed:
        printed += os.read(master, 10_000).decode()
    os.write(master, key.encode())
    while running.poll() is None or looks:
        try:
            printed += os.read(master, 10_000).decode()
        except OSError:  # the other end is closed
            break
    os.close(master)
    assert running.wait() == 5
    assert "no verdict; " in printed and "Enter trains 1 more seeds (about " in printed
    assert ("4 seeds [" in printed) == (looks == 2)
