"""Trained models by name, by run and by alias: loaded only if they match their record, registered with a card, served."""

from __future__ import annotations

import math
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
import torch

import stacklm
from stacklm.config.evaluate import Evaluate, Sample
from stacklm.config.schema import ParamsError
from stacklm.data import DataError
from stacklm.evaluate.generate import continue_text
from stacklm.files import read_json, write_json
from stacklm.model.store import StoreError, load_model
from stacklm.pipeline.models import CHANGED, SAME, UNKNOWN, find, load, register
from stacklm.pipeline.project import Project
from stacklm.pipeline.tracking.run import Pretraining
from stacklm.pipeline.tracking.store import tracking_uri
from stacklm.pipeline.tracking.sync import sync_all
from support.checkout import TINY_PARAMS
from support.tracking_project import client, publish, publish_evaluation, publish_model, publish_report, runs


@pytest.fixture
def trained(project: Project) -> Project:
    """Two models with their evaluations."""
    (project.root / "params.yaml").write_text(TINY_PARAMS)
    return publish(project, "stacked", "dense")


def test_a_name_gives_model_tokenizer_and_config_with_a_verdict_on_each_fingerprint(trained: Project):
    found = load("dense", trained)
    wanted, config = load_model(trained.root / "out/models/dense-1")
    ids_BT = torch.arange(8)[None]
    torch.testing.assert_close(found.model(ids_BT), wanted.eval()(ids_BT), rtol=0, atol=0)
    assert found.config == config and found.tokenizer.decode(found.tokenizer.encode("def ")) == b"def "
    assert found.facts["path"] == "out/models/dense-1" and found.facts["bits per byte, test"] == f"{0.75 / math.log(2):.4f}"
    same = dict.fromkeys(("record", "weights", "settings", "tokenizer", "data"), SAME)
    assert found.verdicts == {**same, "code": CHANGED}  # a made-up hash is on record
    with pytest.raises(ParamsError, match="no model 'dens'"):
        load("dens", trained)


def test_a_name_without_a_seed_is_that_of_the_first_seed_and_no_name_that_of_the_first_model(project: Project):
    (project.root / "params.yaml").write_text(TINY_PARAMS.replace("seeds: [1]", "seeds: [2, 10]"))
    for run in (("dense", 10), ("dense", 2), ("stacked", 2)):
        publish_model(project, run[0], seed=run[1])
    assert [find(project, name).item.run for name in ("dense", "dense-10", None)] == ["dense-2", "dense-10", "stacked-2"]
    with pytest.raises(ParamsError, match="stacked-10 is not trained yet"):
        find(project, "stacked-10")
    (project.root / "params.yaml").write_text(TINY_PARAMS.replace("  dense:", "  other:"))
    assert find(project, "dense-10").item.run == "dense-10"


def test_in_python_it_is_one_function_which_warns_of_changes(trained: Project, monkeypatch):
    (trained.root / "dvc.yaml").write_text("")
    monkeypatch.chdir(trained.root)
    with pytest.warns(UserWarning, match="code changed"):
        model, tokenizer, config = stacklm.load("stacked-1")
    assert (model.training, tokenizer.vocab_size, config.context_length) == (False, config.vocab_size, 8)


def test_what_is_not_as_recorded_is_refused_by_name(trained: Project):
    out = trained.root / "out"
    record = read_json(out / "records/pretrain@dense-1.json")
    write_json(out / "records/pretrain@dense-1.json", {**record, "code": "0" * 64})
    with pytest.raises(StoreError, match="record not as recorded"):
        load("dense", trained)
    write_json(out / "records/pretrain@dense-1.json", {**record, "accepted": [{"code": "1" * 64}]})
    assert load("dense", trained).verdicts["record"] == SAME
    publish_model(trained, "dense", weights=2)  # whole, but not those that were evaluated
    with pytest.raises(StoreError, match=r"weights.* not as recorded"):
        load("dense", trained)
    config = out / "models/stacked-1/config.json"
    write_json(config, {**read_json(config), "context_length": 9})
    with pytest.raises(StoreError, match=r"settings.* not as recorded"):
        load("stacked", trained)
    (out / "tokenizer/record.json").write_text("{}")
    with pytest.raises((StoreError, DataError), match="tokenizer"):
        load("stacked", trained)


def test_data_that_changed_or_is_not_there_is_told(trained: Project):
    manifest = trained.root / "out/shards/manifest.json"
    load("dense", trained)
    before = manifest.read_text()
    for run in Pretraining.finished(trained):
        write_json(run.note("facts"), run.facts())  # as training notes them when it begins
    manifest.write_text(before + " ")
    assert load("dense", trained).verdicts["data"] == CHANGED
    manifest.unlink()
    assert load("dense", trained).verdicts["data"] == UNKNOWN


def test_a_registered_model_has_its_card_and_is_found_by_its_alias_and_by_its_run(trained: Project):
    with pytest.raises(ParamsError, match="champion"):
        register(trained, "dense", "champion")
    assert register(trained, "stacked", "production") == "models:/stacklm@production"
    assert register(trained, "dense", "production", "mit") == "models:/stacklm@production"
    version = client(trained).get_model_version_by_alias("stacklm", "production")
    assert version.tags["model"] == "dense" and version.description.startswith("# dense-1")
    assert "Over 2 seeds the mean is 1.0500 bits per byte on the test set, 95% t interval" in version.description
    assert "The licence of the model: mit." in version.description and "A finding." in version.description
    (run,) = [one.info.run_id for one in runs(trained) if one.data.tags["model"] == "dense"]
    for target in ("models:/stacklm@production", run, f"models:/{version.tags['stacklm.model_id']}"):
        found = load(target, trained)
        same = dict.fromkeys(("weights", "settings", "tokenizer", "data"), SAME)
        assert found.verdicts == {**same, "code": CHANGED} and found.config.architecture.kind == "dense"
    assert sync_all(trained)  # the comparison registers them as well
    assert "model: mit." in client(trained).get_model_version_by_alias("stacklm", "production").description
    with pytest.raises(RuntimeError, match="nope"):
        load("models:/stacklm@nope", trained)
    with pytest.raises(ParamsError, match="no model of stacklm is logged"):
        load("0" * 32, trained)


def test_files_of_a_registered_model_that_were_changed_together_are_refused(trained: Project):
    register(trained, "dense", "production")
    version = client(trained).get_model_version_by_alias("stacklm", "production")
    (stored,) = (trained.state / "mlartifacts" / "models" / version.tags["stacklm.model_id"]).rglob("model")
    publish_model(trained, "dense", weights=2)
    for name in ("model.safetensors", "config.json"):
        shutil.copyfile(trained.root / "out/models/dense-1" / name, stored / name)
    with pytest.raises(StoreError, match=r"weights.* not as recorded"):
        load("models:/stacklm@production", trained)


def test_what_a_comparison_registers_has_cards_too(trained: Project):
    assert sync_all(trained)
    found = client(trained).search_model_versions("name = 'stacklm'")
    assert {version.description.partition("\n")[0] for version in found} == {"# stacked-1", "# dense-1"}


def test_the_alias_champion_follows_the_last_comparison_and_loads(project: Project, monkeypatch):
    import mlflow

    def registered() -> tuple[str | None, list[str]]:
        """The champion's name, and those of all versions."""
        tracker = client(project)
        names = sorted(version.tags["model"] for version in tracker.search_model_versions("name = 'stacklm'"))
        try:
            return tracker.get_model_version_by_alias("stacklm", "champion").tags["model"], names
        except mlflow.MlflowException:
            return None, names

    for model in ("stacked", "dense"):
        publish_model(project, model)
        publish_evaluation(project, model)
    assert sync_all(project) and registered() == (None, [])  # nothing was compared yet
    for best in ("dense", "stacked", None):
        publish_report(project, "stacked", "dense", best=best)
        assert sync_all(project) and registered() == (best, ["dense", "stacked"])
        if best == "dense":
            with monkeypatch.context() as patch:
                patch.setenv("MLFLOW_TRACKING_URI", tracking_uri(project))
                (text,) = mlflow.pyfunc.load_model("models:/stacklm@champion").predict(["def "], params={"tokens": 4})
            assert isinstance(text, str)


@pytest.mark.slow
def test_mlflow_serves_a_registered_model_text_in_text_out(trained: Project, tmp_path: Path):
    address = register(trained, "stacked", "production")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", address, "--env-manager", "local", "--host", "127.0.0.1"]
    environment = {
        **os.environ,
        "MLFLOW_TRACKING_URI": tracking_uri(trained),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": str(Path(stacklm.__file__).parent.parent),
    }
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen([*command, "--port", str(port)], env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        for _ in range(240):
            try:
                httpx.get(f"http://127.0.0.1:{port}/ping", timeout=1).raise_for_status()
                break
            except httpx.HTTPError:
                assert server.poll() is None, (tmp_path / "log").read_text()
                time.sleep(0.5)
        body = {"inputs": ["def ", "ü"], "params": {"max_new_tokens": 6, "temperature": 0.0}}
        answer = httpx.post(f"http://127.0.0.1:{port}/invocations", json=body, timeout=60).json()
    finally:
        os.killpg(server.pid, 15)
        server.wait()
    config = Evaluate(sample=Sample(max_new_tokens=6, temperature=0), device="cpu", threads=torch.get_num_threads())
    folders = trained.root / "out/models/stacked-1", trained.root / "out/tokenizer"
    assert answer == {"predictions": ["".join(continue_text(config, *folders, prompt, "kv")) for prompt in body["inputs"]]}
