"""A logged model, loaded with MLflow: text in, text out."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from stacklm.code import import_closure
from stacklm.config.evaluate import Evaluate, Sample
from stacklm.evaluate.generate import continue_text
from stacklm.files import sha256
from stacklm.model.store import load_model
from stacklm.pipeline.project import Project
from stacklm.pipeline.tracking.store import tracking_uri
from stacklm.pipeline.tracking.sync import sync_all
from stacklm.pipeline.tracking.weights import REQUIREMENTS
from support import ROOT
from support.tracking_project import VOCAB, logged_model

GREEDY = {"temperature": 0.0, "max_new_tokens": 12}


@pytest.fixture(scope="module")
def logged(synced):
    """A project with a logged model, and the model as MLflow loads it."""
    import mlflow

    model = logged_model(synced)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", tracking_uri(synced))
        yield synced, model, mlflow.pyfunc.load_model(f"models:/{model.model_id}")


def expected(project: Project, prompt: str, **settings) -> str:
    trained, tokenizer = project.root / "out/models/stacked-1", project.root / "out/tokenizer"
    config = Evaluate(sample=Sample(**settings), device="cpu", threads=torch.get_num_threads())
    return "".join(continue_text(config, trained, tokenizer, prompt, "kv"))


def test_it_continues_text_as_generate_does(logged):
    project, _, loaded = logged
    prompts = ["def ", "", "ü\n"]
    assert loaded.predict(["def "]) == [expected(project, "def ")]
    assert loaded.predict(prompts, params=GREEDY) == [expected(project, prompt, **GREEDY) for prompt in prompts]
    assert loaded.predict(["def "], params={"seed": 2}) != loaded.predict(["def "])


def test_requests_at_the_same_time_do_not_mix(logged):
    prompts = [f"def f{i}" for i in range(8)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda prompt: logged[2].predict([prompt], params=GREEDY), prompts))
    assert together == [logged[2].predict([prompt], params=GREEDY) for prompt in prompts]


def test_settings_that_cannot_be_used_are_named(logged):
    with pytest.raises(Exception, match="top_p"):
        logged[2].predict(["def "], params={"top_p": 2.0})


def test_logits_are_those_of_the_model(logged):
    project, _, loaded = logged
    ids_BT = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    original = load_model(project.root / "out/models/stacked-1")[0].eval()
    with torch.no_grad():
        np.testing.assert_array_equal(loaded.get_raw_model()(ids_BT), original(ids_BT))
    assert original(ids_BT).shape == (2, 4, VOCAB)


def test_it_tells_what_goes_in_and_what_it_needs(logged):
    _, model, loaded = logged
    import mlflow

    info = mlflow.models.get_model_info(f"models:/{model.model_id}")
    assert [spec.type.name for spec in (*info.signature.inputs, *info.signature.outputs)] == ["string", "string"]
    assert {param.name for param in info.signature.params} == {"max_new_tokens", "temperature", "top_k", "top_p", "seed"}
    assert loaded.metadata.load_input_example(loaded.metadata.artifact_path.removeprefix("file://")) == ["def "]
    wanted = Path(mlflow.pyfunc.get_model_dependencies(f"models:/{model.model_id}")).read_text().split()
    assert f"torch=={importlib.metadata.version('torch')}" in wanted
    assert f"mlflow=={importlib.metadata.version('mlflow')}" in wanted
    assert info.flavors["python_function"]["python_version"] == ".".join(map(str, sys.version_info[:3]))
    assert {metric.key for metric in model.metrics} >= {"bits_per_byte/test", "loss/valid_whole"}


def test_all_that_loading_imports_is_required():
    modules = ("stacklm.evaluate.generate", "stacklm.model.store", "stacklm.config.evaluate")
    files = frozenset().union(*map(import_closure, modules))
    nodes = [node for file in files for node in ast.walk(ast.parse((ROOT / file).read_text()))]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    installed = {re.match(r"[\w.-]+", line)[0] for line in importlib.metadata.requires("stacklm") if "extra" not in line}
    assert {name for name in installed if any(f"{used}.".startswith(f"{name}.") for used in names)} <= set(REQUIREMENTS)


def test_nothing_in_it_can_be_executed(logged):
    project, model, loaded = logged
    folder = project.state / "mlartifacts" / "models" / model.model_id
    files = {path.name for path in folder.rglob("*") if path.is_file()}
    assert not [name for name in files if name.endswith((".py", ".pkl", ".pickle", ".pt", ".bin", ".pyc"))]
    assert {"MLmodel", "model.safetensors", "config.json", "tokenizer.json"} <= files
    flavor = loaded.metadata.flavors["python_function"]
    assert flavor["loader_module"] == "stacklm.pipeline.tracking.weights" and not flavor.get("code")


def test_a_model_without_its_tokenizer_is_replaced_once_it_is_back_with_its_scores(published):
    assert sync_all(published)
    model, tokenizer = logged_model(published), published.root / "out/tokenizer/token_bytes.json"
    whole, before = tokenizer.read_text(), sha256(tokenizer)
    tokenizer.write_text("[]")
    assert sync_all(published)
    tokenizer.write_text(whole)
    assert sha256(tokenizer) == before and sync_all(published)
    again = logged_model(published)
    assert again.model_id != model.model_id and again.status == "READY"
    assert {metric.key for metric in again.metrics} == {metric.key for metric in model.metrics}
