from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from stacklm.config.model import Dense, Stack, Stacked
from stacklm.files import read_json, sha256, write_json
from stacklm.model.build import ModelConfig, build
from stacklm.model.store import StoreError, load_model, save_model

STACKED = Stacked(d_model=16, n_heads=2, stacks=(Stack(4, 4, 16), Stack(4, 8, 16)))
DENSE = Dense(d_model=16, n_heads=2, n_layers=2, d_ff=32)
TIED = replace(DENSE, tie_embeddings=True)
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_ff": 48}, r"blocks\.0\.feed_forward\.down\.weight has shape \[16, 32\] instead of \[16, 48\]"),
        ({"n_layers": 3}, r"blocks\.2\.attention\.key\.weight is missing.* more; take both"),
        ({"n_layers": 1}, r"blocks\.1\.attention\.key\.weight is not part of it"),
    ],
)
def test_weights_of_another_model_are_refused_with_names_and_shapes(tmp_path, change, message):
    save(tmp_path, DENSE)
    config = read_json(tmp_path / "config.json")
    config["architecture"] |= change
    write_json(tmp_path / "config.json", config)
    with pytest.raises(StoreError, match=message):
        load_model(tmp_path)


def test_the_digests_of_tokenizer_and_weights_are_recorded(tmp_path):
    save_model(tmp_path, build(DENSE, 50, 12), DENSE, 50, 12, tokenizer="5f" * 32)
    config = read_json(tmp_path / "config.json")
    assert config["tokenizer"] == "5f" * 32
    load_model(tmp_path, "5f" * 32)
    with pytest.raises(StoreError, match=r"config\.json: trained with tokenizer (5f){32}, not with (60){32}"):
        load_model(tmp_path, "60" * 32)
    assert config["sha256"] == sha256(tmp_path / "model.safetensors")


@pytest.mark.parametrize("bit", [0, 3, 7])
def test_a_flipped_bit_is_refused_wherever_it_is(tmp_path, bit):
    save(tmp_path, DENSE)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    for place in (9, len(whole) // 2, len(whole) - 1):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << bit
        weights.write_bytes(damaged)
        with pytest.raises(StoreError, match=r"model\.safetensors: damaged, its SHA-256 is"):
            load_model(tmp_path)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_refused(tmp_path, value):
    model = build(DENSE, 50, 12)
    model.blocks[1].feed_forward.down.weight.data[3, 1] = value
    save_model(tmp_path, model, DENSE, 50, 12)
    with pytest.raises(StoreError, match=r"blocks\.1\.feed_forward\.down\.weight has numbers that are not finite"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ('{"architecture": {"ki', "config.json: damaged"),
        ("[]", "config.json: damaged or of an earlier version"),
        ('{"architecture": {}, "vocab_size": 50, "context_length": 12}', "without sha256, tokenizer; train the model again"),
        ('{"architecture": 7, "vocab_size": 50, "context_length": 12, "tokenizer": null, "sha256": ""}', "config.json"),
        ('{"vocab_size": 50, "context_length": 12, "tokenizer": null, "sha256": ""}', "config.json.*architecture"),
    ],
)
def test_damaged_settings_are_refused(tmp_path, content, why):
    save(tmp_path, DENSE)
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(StoreError, match=why):
        load_model(tmp_path)


def test_files_have_the_permissions_of_any_new_file(tmp_path):
    save(tmp_path / "model", DENSE)
    (tmp_path / "new").touch()
    assert {path.stat().st_mode for path in (tmp_path / "model").iterdir()} == {(tmp_path / "new").stat().st_mode}


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(StoreError, match=r"config\.json: no such file"):
        load_model(tmp_path)
