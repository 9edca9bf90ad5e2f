"""What a flow is made of, asked without running it."""

from __future__ import annotations

import dataclasses
import os

import pytest
from conftest import TINY_PARAMS
from ruamel.yaml import YAML

from stacklm.config.params import parse


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


def test_the_flows_can_be_deployed_by_name(pretrain):
    for name in ("pretrain", "download", "tokenizer", "shards", "audit", "evaluate", "compare"):
        assert getattr(pretrain, name).name == name


@pytest.mark.parametrize(
    ("device", "threads", "processors", "expected"), [("cpu", 2, 8, 4), ("cpu", 4, 2, 1), ("cuda", 1, 8, 1), ("mps", 1, 8, 1)]
)
def test_models_train_side_by_side_on_enough_processors(pretrain, monkeypatch, device, threads, processors, expected):
    monkeypatch.setattr(os, "cpu_count", lambda: processors)
    train = parse(YAML(typ="safe").load(TINY_PARAMS)).train
    assert pretrain.models_at_once(dataclasses.replace(train, device=device, threads=threads)) == expected
