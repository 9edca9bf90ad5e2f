"""`stacklm export` as a user runs it, in a project that is trained."""

from __future__ import annotations

from pathlib import Path

import pytest
from ruamel.yaml import YAML

from stacklm.config.params import load
from stacklm.files import sha256
from support.checkout import Checkout
from support.prose import blocks


def test_a_trained_model_is_exported_with_a_card_that_says_how_to_repeat_it(finished: Checkout, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    text = finished.cli("export", "hf", str(tmp_path / "hf"), "dense", "--license", "MIT")
    assert f"wrote {tmp_path / 'hf'}" in text
    card = (tmp_path / "hf/README.md").read_text()
    front = YAML(typ="safe").load(card.split("---")[1])
    assert front["license"] == "mit" and front["pipeline_tag"] == "text-generation"
    assert {"model.safetensors", "config.json", "tokenizer.json", "SHA256SUMS"} <= {
        path.name for path in (tmp_path / "hf").iterdir()
    }
    (settings,) = blocks(card, "yaml")
    (tmp_path / "params.yaml").write_text(settings)
    again, params = load(tmp_path / "params.yaml"), load(finished.root / "params.yaml")
    assert (again.data, again.tokenizer, again.train, again.seeds) == (params.data, params.tokenizer, params.train, (1,))
    assert again.models == {"dense": params.models["dense"]}


def test_a_model_that_is_not_trained_is_named(finished: Checkout, fresh: Checkout, tmp_path: Path) -> None:
    missing = finished.cli("export", "hf", str(tmp_path / "hf"), "dens", code=2)
    assert "no model 'dens'; there are stacked-1, dense-1" in missing
    assert "dvc repro" in fresh.cli("export", "hf", str(tmp_path / "hf"), "dense", code=2)
    assert not (tmp_path / "hf").exists()


def test_a_model_is_loaded_by_name_and_by_an_alias_that_it_was_given(finished: Checkout, tmp_path: Path) -> None:
    checkout = finished.copy(tmp_path / "project")
    text = checkout.cli("load", "dense-1")
    assert "path                 out/models/dense-1\n" in text and text.count("as recorded\n") == 6
    assert sha256(finished.root / "out/tokenizer")[:12] in text
    assert "models:/stacklm@production" in checkout.cli("register", "dense", "--alias", "production", "--license", "mit")
    text = checkout.cli("load", "models:/stacklm@production")
    assert text.count("as recorded\n") == 5
    assert "champion" in checkout.cli("register", "dense", "--alias", "champion", code=2)
    assert "nope not found" in checkout.cli("load", "models:/stacklm@nope", code=2)


def test_dvc_brings_the_models_of_a_tag(finished: Checkout, tmp_path: Path) -> None:
    checkout = finished.copy(tmp_path / "project")
    checkout.run("git", "-c", "user.name=t", "-c", "user.email=t@example.com", "tag", "-a", "models@v1.0.0", "-m", "first")
    checkout.run("dvc", "artifacts", "get", ".", "models", "--rev", "v1.0.0", "-o", "brought")
    assert sha256(checkout.root / "brought") == sha256(checkout.root / "out/models")
