"""`stacklm export` as a user runs it, in a project that is trained."""

from __future__ import annotations

from pathlib import Path

import pytest
from ruamel.yaml import YAML

from stacklm.config.params import load
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
    assert "no trained model 'dens'; there are dense-1, stacked-1" in missing
    assert "dvc repro" in fresh.cli("export", "hf", str(tmp_path / "hf"), "dense", code=2)
    assert not (tmp_path / "hf").exists()
