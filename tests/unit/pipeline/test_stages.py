"""The table of stages is the single source: dvc.yaml, the functions and the code dependencies match it."""

from __future__ import annotations

import functools
import inspect
import json
import subprocess
import sys
from dataclasses import replace

import pytest

from stacklm.code import import_closure
from stacklm.pipeline.dvc import dvc_yaml
from stacklm.pipeline.stages import STAGES, Stage, inputs_of, instances, stage, upstream
from support import ROOT
from support.checkout import PARAMS

TWO_SEEDS = replace(PARAMS, seeds=(1, 7))


def test_dvc_yaml_is_what_the_table_says():
    assert (ROOT / "dvc.yaml").read_text(encoding="utf-8") == dvc_yaml(), "run `stacklm dvc-yaml` and commit dvc.yaml"


@pytest.mark.parametrize("entry", STAGES, ids=lambda entry: entry.name)
def test_each_function_takes_exactly_what_the_table_gives_it(entry: Stage):
    paths = {**entry.reads, **entry.untracked_reads, **entry.writes, **entry.untracked_writes}
    given = {*entry.params, *paths, *(["work", "earlier"] if entry.resumable else [])}
    assert set(inspect.signature(entry.load()).parameters) == given


@functools.cache
def loaded(module: str) -> dict[str, str]:
    """The modules, with their files, that importing a module loads in a new process."""
    script = f"import json, sys, {module}; print(json.dumps({{n: getattr(m, '__file__', '') for n, m in sys.modules.items()}}))"
    return json.loads(subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, check=True).stdout)


@pytest.mark.parametrize("entry", STAGES, ids=lambda entry: entry.name)
def test_the_code_of_a_stage_holds_every_module_that_is_loaded_which_are_none_of_the_pipeline(entry: Stage):
    """Importing the stage in a new process loads nothing of ours beyond the closure found by reading."""
    module = entry.function.partition(":")[0]
    ours = {file.removeprefix(f"{ROOT}/") for name, file in loaded(module).items() if name.split(".")[0] in ("stacklm", "flows")}
    assert module.replace(".", "/") + ".py" in ours
    assert ours <= import_closure(module)
    assert not {name.split(".")[0] for name in loaded(module)} & {"prefect", "dvc", "mlflow"}
    assert not [file for file in entry.code(ROOT) if file.startswith(("stacklm/pipeline", "flows"))]


def test_order_respects_what_each_stage_reads():
    seen: set[str] = set()
    for entry in [item.stage for item in instances(TWO_SEEDS)]:
        assert upstream(entry) <= seen | {entry.name}
        seen.add(entry.name)
    assert upstream(stage("compare")) == {"pretrain", "evaluate", "shards"}
    assert upstream(stage("pretrain")) == {"audit", "shards"}
    addresses = [item.address for item in instances(TWO_SEEDS) if item.stage.name in ("audit", "pretrain")]
    pairs = [f"pretrain@{model}-{seed}" for seed in (1, 7) for model in ("stacked", "dense")]
    assert addresses == ["audit@stacked", "audit@dense", *pairs]


def test_an_instance_reads_what_its_own_model_and_seed_made():
    items = {item.address: item for item in instances(TWO_SEEDS)}
    read = {address: {one.address for one in inputs_of(item, TWO_SEEDS)} for address, item in items.items()}
    assert read["pretrain@dense-7"] == {"shards", "audit@dense"}
    assert read["evaluate@dense-7"] == {"pretrain@dense-7", "shards", "tokenizer", "inputs"}
    models = [f"{model}-{seed}" for model in TWO_SEEDS.models for seed in (1, 7)]
    assert {f"{stage}@{model}" for stage in ("pretrain", "evaluate") for model in models} < read["compare"]
    assert items["pretrain@dense-7"].settings(TWO_SEEDS)["config"].seed == 7
    assert items["evaluate@dense-7"].settings(TWO_SEEDS) == items["evaluate@dense-1"].settings(TWO_SEEDS)


def test_an_unknown_stage_names_the_known_ones():
    with pytest.raises(KeyError, match="inputs, download"):
        stage("downlaod")
