import json

import pytest
import torch
from safetensors.torch import load_file

from stacklm.config.model import Dense, Stack, Stacked
from stacklm.model.build import ModelConfig, build
from stacklm.model.store import StoreError, load_model, save_model

STACKED = Stacked(width=16, heads=2, stacks=(Stack(4, 4, 16), Stack(4, 8, 16)))
DENSE = Dense(width=16, heads=2, layers=2, hidden=32)
TIED = Dense(width=16, heads=2, layers=2, hidden=32, tied=True)
IDS = torch.arange(12)[None]


def save(folder, architecture):
    model = build(architecture, 50, 12)
    save_model(folder, model, architecture, 50, 12)
    return model


@pytest.mark.parametrize("architecture", [STACKED, DENSE, TIED])
def test_a_loaded_model_computes_the_same(tmp_path, architecture):
    model = save(tmp_path / "model", architecture)
    loaded, config = load_model(tmp_path / "model")
    assert config == ModelConfig(architecture, 50, 12)
    assert torch.equal(loaded(IDS), model(IDS))
    assert sorted(file.name for file in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]


def test_a_tied_head_is_written_once_and_stays_tied(tmp_path):
    save(tmp_path, TIED)
    assert "head.weight" not in load_file(tmp_path / "model.safetensors")
    model, _ = load_model(tmp_path)
    assert model.head.weight is model.embedding.weight


def test_the_number_format_is_kept(tmp_path):
    model = build(DENSE, 50, 12).double()
    save_model(tmp_path, model, DENSE, 50, 12)
    assert torch.equal(load_model(tmp_path)[0](IDS), model(IDS))


def test_equal_weights_give_equal_bytes(tmp_path):
    for name in ("a", "b"):
        torch.manual_seed(3)
        save(tmp_path / name, STACKED)
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def test_loading_leaves_the_random_state_alone(tmp_path):
    save(tmp_path, STACKED)
    before = torch.get_rng_state()
    load_model(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def test_weights_of_another_model_are_refused_with_names_and_shapes(tmp_path):
    save(tmp_path, DENSE)
    config = json.loads((tmp_path / "config.json").read_text())
    config["architecture"]["hidden"] = 48
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(StoreError, match=r"blocks\.0\.feed_forward\.down\.weight has shape \[16, 32\] instead of \[16, 48\]"):
        load_model(tmp_path)
    config["architecture"] |= {"hidden": 32, "layers": 3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(StoreError, match=r"blocks\.2\.attention\.key\.weight is missing.* more; take both"):
        load_model(tmp_path)
    config["architecture"]["layers"] = 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(StoreError, match=r"blocks\.1\.attention\.key\.weight is not part of it"):
        load_model(tmp_path)


def test_missing_and_damaged_files_are_named(tmp_path):
    with pytest.raises(StoreError, match=r"config\.json: no such file"):
        load_model(tmp_path)
    save(tmp_path, DENSE)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(StoreError, match=r"model\.safetensors: damaged"):
        load_model(tmp_path)
