"""`stacklm lab show` without a name: the findings of all experiments, from the records in git."""

from __future__ import annotations

import shutil
from pathlib import Path

from ruamel.yaml import YAML

from support import ROOT
from support.checkout import Checkout, write_project
from support.lab_records import SWIGLU

NAMES = {path.stem for path in (ROOT / "experiments").glob("*.yaml")} - {"dvc"}


def test_every_experiment_is_listed_with_its_verdicts_and_nothing_is_written(tmp_path: Path):
    """In what a clone has of the experiments."""
    shutil.copytree(ROOT / "experiments", tmp_path / "experiments", ignore=shutil.ignore_patterns("report", "correlation-*"))
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copyfile(ROOT / name, tmp_path / name)
    clone, before = Checkout(tmp_path), sorted(tmp_path.rglob("*"))
    said = clone.cli("lab", "show")
    assert {line.partition(":")[0] for line in said.splitlines() if line[:1].strip()} >= NAMES
    verdicts = [line.strip() for line in said.partition("\ndefault: ")[2].split("\n\n")[0].splitlines()[1:]]
    assert len(verdicts) == 2 and {*verdicts} <= {*clone.cli("lab", "show", "default").splitlines()}
    assert sorted(path for path in tmp_path.rglob("*") if "report" not in path.parts) == before


def test_a_file_that_cannot_be_read_hides_no_other(tmp_path: Path):
    said = Checkout(write_project(tmp_path, broken="question: [", one=SWIGLU).root).cli("lab", "show")
    assert "broken: " in said and "one: Does SwiGLU help?" in said


def test_a_project_without_experiments_says_so(tmp_path: Path):
    assert "there are no experiments" in Checkout(write_project(tmp_path).root).cli("lab", "show")


def test_every_experiment_is_a_stage_of_dvc():
    stages = YAML(typ="safe").load(ROOT / "experiments" / "dvc.yaml")["stages"]
    ours = {name for name in NAMES if not name.startswith("try-")}  # those of `stacklm try` are of this machine
    assert {*stages["lab"]["matrix"]["experiment"]} == ours
