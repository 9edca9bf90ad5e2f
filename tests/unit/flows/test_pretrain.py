"""The structure of a flow, without running it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from stacklm.config.schema import ParamsError
from stacklm.pipeline.project import trainings_at_once
from support.checkout import PARAMS


@pytest.fixture
def pretrain(monkeypatch, prefect_home):
    monkeypatch.setenv("PREFECT_HOME", str(prefect_home))
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    from flows import pretrain

    return pretrain


def test_every_flow_brings_up_to_date_what_its_stage_needs(pretrain):
    wanted = {name: flow.description.partition(": ")[2] for name, flow in pretrain.FLOWS.items()}
    everything = "inputs, download, tokenizer, shards, audit, pretrain, evaluate, compare"
    assert wanted["pretrain"] == wanted["compare"] == everything
    assert wanted["download"] == "inputs, download"
    assert wanted["shards"] == "inputs, download, tokenizer, shards"
    assert wanted["audit"] == "inputs, download, tokenizer, shards, audit"
    assert wanted["evaluate"] == everything.removesuffix(", compare")


def test_parameters_choose_stages_and_models_and_no_values(pretrain):
    from prefect.exceptions import ParameterTypeError

    def chosen(last: str, models: list[str] | None) -> list[str]:
        return [item.address for item in pretrain.selection(pretrain.with_upstream(last), PARAMS, models)]

    assert chosen("audit", ["dense"]) == ["inputs", "download", "tokenizer", "shards", "audit@dense"]
    alone = chosen("compare", ["dense"])[-3:]
    assert alone == ["audit@dense", "pretrain@dense-1", "evaluate@dense-1"], "no comparison of one model"
    assert chosen("compare", ["dense", "stacked"]) == chosen("compare", None)
    with pytest.raises(ParamsError, match=r"no model 'dens'.*did you mean `dense`"):
        chosen("compare", ["dens"])
    parameters = {name: list(flow.parameters.properties) for name, flow in pretrain.FLOWS.items()}
    assert parameters.pop("pretrain") == ["stage", "models"]
    assert set(map(tuple, parameters.values())) == {("models",)}
    with pytest.raises(ParameterTypeError):
        pretrain.pretrain.validate_parameters({"stage": "shard"})


def test_the_flows_can_be_deployed_by_name(pretrain):
    for name in ("pretrain", "download", "tokenizer", "shards", "audit", "evaluate", "compare"):
        assert getattr(pretrain, name).name == name


@pytest.mark.parametrize(
    ("device", "threads", "processors", "expected"), [("cpu", 2, 8, 4), ("cpu", 4, 2, 1), ("cuda", 1, 8, 1), ("mps", 1, 8, 1)]
)
def test_models_train_side_by_side_on_enough_processors(monkeypatch, device, threads, processors, expected):
    monkeypatch.setattr("stacklm.pipeline.project.processors", lambda: processors)
    assert trainings_at_once(replace(PARAMS.train, device=device, threads=threads)) == expected


def test_an_unknown_flow_is_refused_with_the_known_names(pretrain, monkeypatch, tmp_path, capsys):
    from flows.run import run

    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")  # none is asked
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dvc.yaml").touch()
    assert run("pretrian") == 2
    assert "no flow 'pretrian'; the flows are audit, compare, download, " in capsys.readouterr().err
