"""The package as a wheel: it contains everything that a new project needs, and one runs with only the wheel installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from stacklm.pipeline.init import TEMPLATES
from support import ROOT
from support.checkout import TINY_SETTINGS, Checkout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, since setuptools leaves files beside the source."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("stacklm", "flows"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, source / name)
    build = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(target)], cwd=source, check=True, capture_output=True)
    (built,) = target.glob("*.whl")
    return built


def test_the_wheel_has_the_flows_the_templates_and_the_types(wheel: Path):
    names = {*zipfile.ZipFile(wheel).namelist()}
    assert {f"stacklm/pipeline/templates/{name}" for name in TEMPLATES.values()} <= names
    assert {
        "flows/run.py",
        "flows/server.py",
        "stacklm/py.typed",
        "stacklm/report/templates/page.html",
        "stacklm/export/templates/card.md",
        "stacklm/serve/page.html",
    } <= names
    assert not [name for name in names if name.startswith(("tests", "docs"))]


@pytest.mark.slow
def test_a_new_project_runs_where_there_is_no_checkout(wheel: Path, tmp_path: Path):
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(tmp_path / "venv")}))
    zipfile.ZipFile(wheel).extractall(packages)
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")  # all but this project, which is not there itself
    outside = Checkout(tmp_path, PATH=os.pathsep.join([str(python.parent), os.environ["PATH"]]))

    def stacklm(root: Checkout, *words: str) -> str:
        return root.run(str(python), "-m", "stacklm", *words)

    assert "created my-lab" in stacklm(outside, "init", "my-lab")
    lab = Checkout(tmp_path / "my-lab", **outside.extra)
    assert str(packages) in lab.run(str(python), "-c", "import stacklm, flows; print(stacklm.__file__, flows.__file__)")
    assert lab.run("git", "log", "--format=%s").strip() == "New project by stacklm init"
    stacklm(lab, "params", *(word for one in TINY_SETTINGS for word in ("--set", one)))
    assert "compare           ran" in stacklm(lab, "run-flow", "pretrain")
    assert "Running stage 'pretrain" not in lab.run(str(python), "-m", "dvc", "repro")
    assert "Everything is up to date." in stacklm(lab, "status")
    assert "held equal: parameters" in stacklm(lab, "lab", "plan", "my-model")
    assert stacklm(lab, "generate", "def ", "--model", "mine").strip()
