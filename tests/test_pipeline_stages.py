"""The table of stages is the truth: dvc.yaml, the functions and the code dependencies follow it."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest
from conftest import ROOT

from stacklm.pipeline.dvc import dvc_yaml
from stacklm.pipeline.stages import STAGES, Stage, import_closure, instances, stage, upstream


def test_dvc_yaml_is_what_the_table_says():
    assert (ROOT / "dvc.yaml").read_text(encoding="utf-8") == dvc_yaml(), "run `stacklm dvc-yaml` and commit dvc.yaml"


@pytest.mark.parametrize("entry", STAGES, ids=lambda entry: entry.name)
def test_each_function_takes_exactly_what_the_table_gives_it(entry: Stage):
    given = {*entry.params, *entry.reads, *entry.peeks, *entry.writes, *(["work", "earlier"] if entry.resumable else [])}
    assert set(inspect.signature(entry.load()).parameters) == given


@pytest.mark.parametrize("entry", STAGES, ids=lambda entry: entry.name)
def test_code_dependencies_hold_every_module_that_is_loaded(entry: Stage):
    """Importing the stage in a new process loads nothing of ours beyond the closure found by reading."""
    module = entry.function.partition(":")[0]
    script = (
        f"import sys, {module}; print(*(m.__file__ for n, m in sys.modules.items() if n.split('.')[0] in ('stacklm', 'flows')))"
    )
    loaded = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert {file.removeprefix(f"{ROOT}/") for file in loaded} <= import_closure(module)


@pytest.mark.parametrize("entry", STAGES, ids=lambda entry: entry.name)
def test_stages_know_neither_prefect_nor_dvc_nor_mlflow(entry: Stage):
    module = entry.function.partition(":")[0]
    script = f"import sys, {module}; print(*{{n.split('.')[0] for n in sys.modules}} & {{'prefect', 'dvc', 'mlflow'}})"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split() == []
    assert not [file for file in entry.code() if file.startswith(("stacklm/pipeline", "flows"))]


def test_training_needs_none_of_the_pipelines_packages():
    """The model, the loader and the trainer run where only torch, numpy, safetensors, tqdm and psutil are."""
    script = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {'prefect', 'dvc', 'mlflow', 'datasets', 'pyarrow', 'tokenizers', 'ruamel', 'typer'}:
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
import stacklm.train.pretrain, stacklm.data.shards, stacklm.data.batches, stacklm.model.build
"""
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


def test_order_respects_what_each_stage_reads():
    seen: set[str] = set()
    for entry, _ in instances({"a": None, "b": None}):
        assert upstream(entry) <= seen | {entry.name}
        seen.add(entry.name)
    assert upstream(stage("compare")) == {"pretrain", "evaluate", "shards"}
    assert upstream(stage("pretrain")) == {"audit", "shards"}
    assert [entry.address(model) for entry, model in instances({"a": None, "b": None}) if entry.name == "pretrain"] == [
        "pretrain@a",
        "pretrain@b",
    ]


def test_an_unknown_stage_names_the_known_ones():
    with pytest.raises(KeyError, match="inputs, download"):
        stage("downlaod")
