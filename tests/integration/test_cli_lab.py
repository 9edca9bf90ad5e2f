"""`stacklm lab show` without a name: what all experiments found, from the records in git."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from support import ROOT
from support.checkout import Checkout


@pytest.fixture
def clone(tmp_path: Path) -> Checkout:
    """What a clone has of the experiments."""
    shutil.copytree(ROOT / "experiments", tmp_path / "experiments", ignore=shutil.ignore_patterns("report", "correlation-*"))
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copyfile(ROOT / name, tmp_path / name)
    return Checkout(tmp_path)


def test_every_experiment_is_listed_with_its_verdicts_and_nothing_is_written(clone: Checkout):
    before = sorted(clone.root.rglob("*"))
    said = clone.cli("lab", "show")
    names = {path.stem for path in (ROOT / "experiments").glob("*.yaml")} - {"dvc"}
    assert {line.partition(":")[0] for line in said.splitlines() if line[:1].strip()} >= names
    verdicts = [line.strip() for line in said.partition("\ndefault: ")[2].split("\n\n")[0].splitlines()[1:]]
    assert len(verdicts) == 2 and {*verdicts} <= {*clone.cli("lab", "show", "default").splitlines()}
    assert sorted(path for path in clone.root.rglob("*") if "report" not in path.parts) == before


def test_a_file_that_cannot_be_read_hides_no_other(clone: Checkout):
    (clone.root / "experiments" / "broken.yaml").write_text("question: [")
    said = clone.cli("lab", "show")
    assert "broken: " in said and "default: At equal" in said


def test_a_project_without_experiments_says_so(clone: Checkout):
    shutil.rmtree(clone.root / "experiments")
    assert "there are no experiments" in clone.cli("lab", "show")


def test_every_experiment_is_a_stage_of_dvc():
    names = {path.stem for path in (ROOT / "experiments").glob("*.yaml")} - {"dvc"}
    names = {name for name in names if not name.startswith("try-")}  # those of `stacklm try` on this machine
    stages = YAML(typ="safe").load(ROOT / "experiments" / "dvc.yaml")["stages"]
    assert {*stages["lab"]["matrix"]["experiment"]} == names
