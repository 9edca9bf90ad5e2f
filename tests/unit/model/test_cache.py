"""Cached decoding equals the full forward pass for every kind of cache and any grouping of tokens."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from stacklm.config.model import Dense, PublishedAttention, Stack, Stacked
from stacklm.model.build import build
from stacklm.model.cache import INPUTS, KEYS_AND_VALUES, Decoder
from support.model_variants import VARIANTS, scattered
from support.rounding import assert_same, terms_of

pytestmark = pytest.mark.numerical

VOCAB, CONTEXT = 30, 12
DENSE = Dense(d_model=16, n_heads=2, n_layers=2, d_ff=32)
STACKED = Stacked(d_model=16, n_heads=2, stacks=(Stack(4, 4, 16), Stack(4, 12, 16)), dropout=0.2)
CONVOLVED = replace(DENSE, conv_size=4)
BOTH = [(STACKED, KEYS_AND_VALUES), (STACKED, INPUTS), (DENSE, KEYS_AND_VALUES), (CONVOLVED, KEYS_AND_VALUES)]
NAMES = ["stacked keys and values", "stacked inputs", "dense keys and values", "dense with a convolution"]
every_cache = pytest.mark.parametrize(("architecture", "replacements"), BOTH, ids=NAMES)


def made(architecture):
    """A model in which no weight is zero."""
    torch.manual_seed(3)
    return scattered(build(architecture, VOCAB, CONTEXT).eval(), 0.1)


def ids(batch=3):
    return torch.randint(VOCAB, (batch, CONTEXT), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("pieces", [[1] * CONTEXT, [CONTEXT], [5, 1, 1, 5], [1, 4, 7]], ids=str)
@every_cache
def test_it_equals_the_full_forward_at_every_position(architecture, replacements, pieces, dtype):
    model = made(architecture).to(dtype)
    decoder = Decoder(model, CONTEXT, replacements)
    features = torch.cat([decoder.features(piece) for piece in ids().split(pieces, dim=1)], dim=1)
    assert_same(decoder.head(features), model(ids()), terms_of(model, CONTEXT))


@every_cache
def test_it_begins_anew_with_other_windows(architecture, replacements):
    model = made(architecture)
    decoder = Decoder(model, CONTEXT, replacements)
    decoder.features(ids(batch=3))
    decoder.reset()
    decoder.features(ids(batch=2)[:, :4])
    assert_same(decoder.features(ids(batch=2)[:, 4:]), model.features(ids(batch=2))[:, 4:], terms_of(model, CONTEXT))


def test_what_is_kept_of_a_token():
    sizes = {}
    for name, (architecture, replacements) in zip(NAMES, BOTH, strict=True):
        decoder = Decoder(made(architecture), CONTEXT, replacements)
        assert decoder.cache.bytes_per_token == 0
        decoder.features(ids()[:, :1])
        sizes[name] = decoder.cache.bytes_per_token
    keys, values = 2 * 4 * 16, 4 * 2 * (4 + 8)  # values of D features, or of K where D is more
    assert sizes == {
        "stacked keys and values": 4 * (keys + values),
        "stacked inputs": 4 * 2 * 16,
        "dense keys and values": 4 * 2 * 2 * 16,
        "dense with a convolution": 4 * 2 * 2 * 16,
    }


@every_cache
def test_the_model_stays_as_it_was(architecture, replacements):
    model = made(architecture)
    before = {name: (id(module), type(module)) for name, module in model.named_modules()}
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    whole = model(ids())
    decoder = Decoder(model, CONTEXT, replacements)
    decoder.features(ids())
    assert {name: (id(module), type(module)) for name, module in model.named_modules()} == before
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(model(ids()), whole)


def test_it_reads_the_weights_of_the_model_and_copies_none():
    model = made(DENSE)
    decoder = Decoder(model, CONTEXT)
    with torch.no_grad():
        model.embedding.weight.add_(1)
    assert_same(decoder.features(ids()), model.features(ids()), terms_of(model, CONTEXT))


def test_more_than_the_context_is_an_error_with_the_numbers():
    decoder = Decoder(made(STACKED), CONTEXT)
    decoder.features(ids())
    with pytest.raises(ValueError, match="13 tokens are more than the model's context of 12"):
        decoder.features(ids()[:, :1])
    assert decoder.cache.tokens == CONTEXT


def test_inputs_are_not_enough_where_keys_know_their_positions():
    with pytest.raises(ValueError, match="inputs of Attention are not enough to decode: its keys are transformed, or shared"):
        Decoder(made(DENSE), CONTEXT, INPUTS)


@pytest.mark.parametrize("name", VARIANTS)
def test_inputs_are_enough_for_exactly_the_variants_with_plain_keys_of_their_own(name):
    attention = VARIANTS[name].attention
    plain = isinstance(attention, PublishedAttention) or not (
        attention.rope or attention.qk_norm or attention.kv_sharing == "stack"
    )
    model = made(VARIANTS[name]).double()
    if plain:
        decoder = Decoder(model, CONTEXT, INPUTS)
        features = torch.cat([decoder.features(piece) for piece in ids().split([5, 1, 1, 5], dim=1)], dim=1)
        assert_same(features, model.features(ids()), terms_of(model, CONTEXT))
    else:
        with pytest.raises(ValueError, match="are not enough to decode"):
            Decoder(model, CONTEXT, INPUTS)


def test_a_model_in_training_mode_is_refused():
    with pytest.raises(ValueError, match="training mode"):
        Decoder(made(STACKED).train(), CONTEXT)


def test_a_tied_head_and_modules_in_lists_are_kept():
    model = made(Dense(d_model=16, n_heads=2, n_layers=1, d_ff=32, tie_embeddings=True))
    decoder = Decoder(model, CONTEXT)
    assert decoder.head.weight is model.embedding.weight
    assert isinstance(model.blocks, nn.ModuleList)
    assert_same(decoder.features(ids()), model.features(ids()), terms_of(model, CONTEXT))
