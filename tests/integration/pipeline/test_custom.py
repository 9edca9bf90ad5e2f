"""A model from a file in the pipeline and in the lab: its code is part of the identity of results."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from stacklm.config.model import Dense, Model, Python
from stacklm.config.params import load
from stacklm.config.schema import ParamsError
from stacklm.files import read_json, sha256
from stacklm.lab.budget import cost, fitted, scaled
from stacklm.lab.trial import Trial, own_digest, run_trial
from stacklm.pipeline.code import code_files, write_code
from stacklm.pipeline.lab import Files
from stacklm.pipeline.project import Project
from stacklm.pipeline.stages import Instance, stage
from support import edit
from support.checkout import TINY_PARAMS, Checkout, write_project
from support.custom_models import FOLDER
from support.train_files import TRAIN, write_text

MINE = "{kind: python, path: linear_attention.py, class: Gated, settings: {layers: 1, d_ff: 32}}"
OLD, NEW = "torch.sigmoid(self.gate(x))", "torch.tanh(self.gate(x))"
EXPERIMENT = f"""\
{{question: q, refuted_by: r, budget: parameters, margin: 0.005, seeds: {{tune: [101], judge: [1, 2, 3]}}, rates: 3,
 baseline: {{architecture: {{kind: dense, d_model: 16, n_heads: 2, n_layers: 1, d_ff: 40}}}},
 candidates: {{mine: {{model: {{architecture: {MINE}}}}}, wide: {{change: {{architecture.d_ff: 41}}}}}}}}
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """With the models `mine` and `dense`, an experiment `one`, and tokens."""
    for file in ("linear_attention.py", "layers.py"):
        shutil.copy(FOLDER / file, tmp_path)
    first, _, rest = TINY_PARAMS.partition("  stacked:\n")
    params = f"{first}  mine:\n    architecture: {MINE}\n{rest[rest.index('  dense:') :]}"
    project = write_project(tmp_path, params, one=EXPERIMENT)
    write_text(tmp_path / "out" / "shards")
    monkeypatch.chdir(tmp_path / "experiments")  # files are looked for from the project's root
    return project


def test_stages_of_a_model_depend_on_its_code_and_those_of_others_do_not(project: Project) -> None:
    params = load(project.params_file)
    write_code(project, Instance(stage("inputs")), params)
    folder = project.root / "out/code/models"
    assert read_json(folder / "dense.json") == {}
    assert {"linear_attention.py Gated.forward", "layers.py GatedUnit.forward"} <= read_json(folder / "mine.json").keys()
    for name in ("audit", "pretrain", "evaluate"):
        before = {model: code_files(project, Instance(stage(name), model, 1), params) for model in ("mine", "dense")}
        edit(project.root / "layers.py", OLD, NEW)
        after = {model: code_files(project, Instance(stage(name), model, 1), params) for model in ("mine", "dense")}
        edit(project.root / "layers.py", NEW, OLD)
        assert after["dense"] == before["dense"]
        assert [path for path in after["mine"] if after["mine"][path] != before["mine"][path]] == ["out/code/models/mine.json"]
    (project.root / "linear_attention.py").unlink()
    with pytest.raises(ParamsError, match=r"models\.mine\.architecture: path: no file linear_attention\.py in"):
        write_code(project, Instance(stage("inputs")), params)


def test_trials_of_one_arm_alone_change_with_its_file_and_an_experiment_that_began_is_refused(project: Project) -> None:
    files = Files(project, "one")
    lab = files.begin()
    identities = {arm.name: lab.trial(arm, 1e-3, 1).identity for arm in lab.arms}
    assert read_json(files.origin)["models"].keys() == {"mine"}
    edit(project.root / "layers.py", OLD, NEW)
    with pytest.raises(ParamsError, match=r"trials were made before layers\.py GatedUnit\.forward changed"):
        Files(project, "one").begin()
    shutil.rmtree(files.origin.parent)
    lab = Files(project, "one").begin()
    changed = {arm.name: lab.trial(arm, 1e-3, 1).identity for arm in lab.arms}
    assert [name for name in identities if changed[name] != identities[name]] == ["mine"]


def test_a_trial_is_run_with_the_code_that_it_was_planned_with(project: Project) -> None:
    model = load(project.params_file).models["mine"]
    shards = project.root / "out/shards"
    train = replace(TRAIN, max_steps=4, warmup_steps=1)
    trial = Trial(model, train, sha256(shards / "manifest.json"), "c", own_digest(model.architecture))
    record = run_trial(trial, shards, project.state)
    assert record["own"] == trial.own
    assert record["test"]["bits_per_byte"] > 0
    edit(project.root / "layers.py", OLD, NEW)
    with pytest.raises(ValueError, match=f"the code of the model of trial {trial.identity} has changed since it was planned"):
        run_trial(trial, shards, project.state)


def test_the_budget_is_met_by_the_setting_d_ff_and_sizes_are_those_of_the_file(project: Project) -> None:
    mine = load(project.params_file).models["mine"]
    target = cost(Model(Dense(d_model=16, n_heads=2, n_layers=1, d_ff=100)), TRAIN, 300)
    for axis in ("parameters", "training_flops"):
        model, reached = fitted("mine", mine, TRAIN, 300, target, axis)
        assert getattr(reached, axis) == pytest.approx(getattr(target, axis), rel=0.003)
        assert isinstance(model.architecture, Python) and model.architecture.settings["d_ff"] != 32
    bare = replace(mine, architecture=replace(mine.architecture, settings={"layers": 1}))
    with pytest.raises(ParamsError, match=r"its settings, which have no d_ff to adjust, -\d+\.\d% from the baseline's"):
        fitted("mine", bare, TRAIN, 300, target, "parameters")
    assert scaled(mine.architecture, 1) == mine.architecture
    with pytest.raises(ParamsError, match="sizes: 2 multiplies widths, but the widths of kind python are unknown"):
        scaled(mine.architecture, 2)


@pytest.mark.slow
def test_the_pipeline_trains_a_model_from_a_file_and_names_what_changed_in_it(fresh: Checkout) -> None:
    for file in ("linear_attention.py", "layers.py"):
        shutil.copy(FOLDER / file, fresh.root)
    edit(fresh.root / "params.yaml", "models:\n", f"models:\n  mine:\n    architecture: {MINE}\n")
    fresh.repro()
    assert "Everything is up to date." in fresh.cli("status")
    assert "- mine: Gated from linear_attention.py, layers 1, d_ff 32" in (fresh.root / "out/report/report.md").read_text()
    fresh.cli("generate", "def ", "--model", "mine")
    path = fresh.root / "layers.py"
    path.write_text("# the same\n" + path.read_text())
    fresh.cli("status", "--quiet")
    edit(path, OLD, NEW)
    lines = [line for line in fresh.cli("status").splitlines() if "layers.py GatedUnit.forward changed" in line]
    assert [line.split()[0] for line in lines] == ["audit@mine", "pretrain@mine-1", "evaluate@mine-1"]
    printed = fresh.cli("generate", "def ", "--model", "mine", code=2)
    assert "layers.py GatedUnit.forward changed since this model was trained" in printed
    edit(path, "return self.down", "return self.dawn")
    line = next(i for i, line in enumerate(path.read_text().splitlines(), start=1) if "self.dawn" in line)
    printed = fresh.repro("audit@mine", code=None)
    assert f"layers.py, line {line}, in forward" in printed
    assert "AttributeError: 'GatedUnit' object has no attribute 'dawn'" in printed and "Traceback" not in printed
