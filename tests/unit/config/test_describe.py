"""`stacklm params` explains every key, and editors get a schema."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jsonschema
import pytest
from ruamel.yaml import YAML

from stacklm.config import data, evaluate, model, optimizer, tokenizer, train
from stacklm.config.describe import descriptions, explained, json_schema
from stacklm.config.params import Params, load, parse
from stacklm.config.schema import plain
from support import ROOT
from support.settings import changed, refusal

SHIPPED = sorted([ROOT / "params.yaml", *(ROOT / "docs/params").glob("*.yaml")])
SECTIONS = {
    one
    for module in (data, evaluate, model, optimizer, tokenizer, train)
    for one in vars(module).values()
    if isinstance(one, type) and dataclasses.is_dataclass(one) and one.__module__ == module.__name__
}


def from_yaml(text: str) -> object:
    return YAML(typ="safe", pure=True).load(text)


def in_a_file(settings: Params) -> dict:
    """All settings as a file may hold them: the seed of one training is no key."""
    tree = plain(settings)
    return {**tree, "train": {key: value for key, value in tree["train"].items() if key != "seed"}}


@pytest.mark.parametrize("kind", [Params, *sorted(SECTIONS, key=lambda kind: kind.__name__)], ids=lambda kind: kind.__name__)
def test_every_key_has_a_description(kind: type) -> None:
    assert {field.name for field in dataclasses.fields(kind)} - set(descriptions(kind)) == set()


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_what_is_printed_holds_the_same_settings(path: Path) -> None:
    settings = load(path)
    assert from_yaml(explained(settings)) == in_a_file(settings)
    assert parse(from_yaml(explained(settings))) == settings


def test_every_key_is_explained_once_with_type_default_and_allowed_values() -> None:
    text = explained(load(ROOT / "params.yaml"))
    joined = " ".join(text.replace("#", " ").split())
    for kind in SECTIONS:
        for field in dataclasses.fields(kind):
            hidden = (kind, field.name) == (train.Train, "seed")
            assert (descriptions(kind)[field.name] in joined) != hidden
    assert joined.count(descriptions(model.Dense)["n_layers"]) == 1
    assert "which wsd decays. A number >= 0 and <= 1; default 0.2." in joined
    assert "How the learning rate falls after warm-up." in joined and "One of cosine, linear, wsd; default cosine." in joined
    assert "null: never. A number > 0, or null; default 1.0." in joined
    assert "the 256 bytes and the merges. A whole number >= 257 and <= 16777216; required." in joined
    assert max(map(len, text.splitlines())) <= 120


def test_the_committed_schema_is_current_and_params_yaml_points_to_it() -> None:
    line = (ROOT / "params.yaml").read_text().partition("\n")[0]
    path = ROOT / line.removeprefix("# yaml-language-server: $schema=")
    assert json.loads(path.read_text()) == json_schema(), f"run `stacklm params --schema > {path.relative_to(ROOT)}`"


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft202012Validator:
    jsonschema.Draft202012Validator.check_schema(json_schema())
    return jsonschema.Draft202012Validator(json_schema())


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_schema_accepts_shipped_settings_with_and_without_their_defaults(validator, path: Path) -> None:
    validator.validate(from_yaml(path.read_text()))
    validator.validate(in_a_file(load(path)))


MUON = {"kind": "muon", "adamw": {"eps": 1e-9}}
FILES = {"kind": "files", "paths": ["a.txt"], "max_bytes": None}


@pytest.mark.parametrize(("key", "value"), [("models.dense.optimizer", MUON), ("data.source", FILES), ("evaluate", {})])
def test_the_schema_accepts_other_kinds(validator, key: str, value: object) -> None:
    tree = changed(from_yaml((ROOT / "params.yaml").read_text()), key, value)
    parse(tree)
    validator.validate(tree)


DENSE = {"kind": "dense", "d_model": 8, "n_heads": 1, "n_layers": 1, "d_ff": 8}


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("models.dense.architecture.kind", "dens", ["models.dense.architecture.kind", "'dens'", "did you mean `dense`?"]),
        ("models.dense.layers", 3, ["models.dense.layers", "unknown key"]),
        ("models.dense.optimizer.kind", "adam", ["models.dense.optimizer.kind", "'adam'", "did you mean `adamw`?"]),
        ("models.dense.optimizer.momentum", 0.9, ["optimizer.momentum", "unknown key of kind adamw", "one of kind muon"]),
        ("seeds", [-1], ["seeds[0]: -1", ">= 0"]),
        ("seeds", 3, ["seeds: expected a list"]),
        ("tokenizer.vocab_size", 100, ["tokenizer.vocab_size: 100", ">= 257"]),
        ("tokenizer.vocab_size", 2**33, ["tokenizer.vocab_size", "<= "]),
        ("train.stepz", 3, ["train.stepz", "unknown key", "did you mean `max_steps`?"]),
        ("train.max_steps", "many", ["train.max_steps", "whole number", "'many'"]),
        ("train.lr_schedule", "cosin", ["train.lr_schedule", "cosine, linear, wsd", "did you mean `cosine`?"]),
        ("data.source.kind", "file", ["data.source.kind", "stdlib, files, huggingface", "did you mean `files`?"]),
        ("models", {}, ["models", "at least one"]),
        ("models", {"a/b": {}}, ["models.a/b"]),
        ("trian", {}, ["trian", "unknown key", "did you mean `train`?"]),
        ("train.max_steps", 0, ["train.max_steps: 0", ">= 1"]),
        ("train.max_steps", 1.5, ["train.max_steps", "whole number", "1.5"]),
        ("train.compile", 1, ["train.compile", "true or false"]),
        ("train.final_lr_fraction", 1.5, ["train.final_lr_fraction: 1.5", ">= 0 and <= 1"]),
        ("train", {}, ["train.max_steps: missing"]),
        ("tokenizer.special_tokens", "x", ["tokenizer.special_tokens", "a list", "'x'"]),
        ("data.source.paths", ["x"], ["data.source.paths", "unknown key of kind stdlib", "one of kind files"]),
        ("models", {"7": {"architecture": DENSE}}, ["models.7", "begins with a letter"]),
        ("models.dense.architecture.layers", 3, ["models.dense.architecture.layers", "unknown key"]),
        ("models.dense.optimizer.peak_lr", 0, ["models.dense.optimizer.peak_lr: 0", "> 0"]),
        ("models.stacked.architecture.stacks", [{"layers": 1}], ["stacks[0].features: missing"]),
    ],
)
def test_a_wrong_value_is_named_and_the_schema_refuses_it_as_well(validator, key: str, value: object, words: list[str]) -> None:
    tree = changed(from_yaml((ROOT / "params.yaml").read_text()), key, value)
    message = refusal(tree)
    assert [word for word in ["params.yaml", *words] if word not in message] == []
    assert not validator.is_valid(tree)
