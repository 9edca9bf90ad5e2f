from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from stacklm.config.model import Dense, FactoredAttention, Stack, Stacked
from stacklm.config.params import load
from stacklm.model.build import PRESETS, ModelConfig, build
from stacklm.model.count import count, forward_flops, roles
from support import ROOT

SHIPPED = load(ROOT / "params.yaml")
VOCAB, CONTEXT = SHIPPED.tokenizer.vocab_size, SHIPPED.train.context_length
DENSE = Dense(d_model=48, n_heads=3, n_layers=2, d_ff=100)
ARCHITECTURES = {
    **{name: ModelConfig(SHIPPED.models[name].architecture, VOCAB, CONTEXT) for name in ("published", "dense")},
    **PRESETS,
    "swiglu": ModelConfig(replace(DENSE, ffn="swiglu"), 300, 24),
    "conv": ModelConfig(replace(DENSE, conv_size=4), 300, 24),
    "tied": ModelConfig(replace(DENSE, tie_embeddings=True), 300, 24),
    "wide-features": ModelConfig(Stacked(d_model=32, n_heads=8, stacks=(Stack(2, 16, 40), Stack(3, 7, 50))), 300, 24),
}


def published_parameters(config: ModelConfig) -> int:
    """The published count of a stacked model."""
    a, v, c = config.architecture, config.vocab_size, config.architecture.d_model
    last = a.stacks[-1].width
    total = v * c + 2 * c + 2 * c * (len(a.stacks) - 1) + 2 * last + last * v + v
    for stack in a.stacks:
        n, d, w, h = stack.layers, stack.features, stack.width, stack.d_ff
        total += n * (4 * c**2 + 4 * c + c * d + d + 2 * d + 8 * d**2 + 5 * d) + 2 * w * h + h + w
    return total


def beyond_a_token(config: ModelConfig, length: int) -> int:
    """What a stacked forward also multiplies: the folds, once, and the values' padding up to the head dim, a token and position."""
    if isinstance(config.architecture, Dense):
        return 0
    c, heads = config.architecture.d_model, config.architecture.n_heads
    total = 0
    for stack in config.architecture.stacks:
        n, d, k = stack.layers, stack.features, c // heads
        biases = 2 * n * d * (c + c)
        outputs = 2 * n * c * c * d
        values = 2 * n * c * c * d if d <= k else 0
        padding = 2 * n * heads * max(k - d, 0) * length * length
        total += biases + outputs + values + padding
    return total


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_parameters_are_those_of_the_built_model(name):
    config = ARCHITECTURES[name]
    with torch.device("meta"):
        model = build(config.architecture, config.vocab_size, config.context_length)
    counts = count(config.architecture, config.vocab_size, config.context_length)
    assert counts.total == sum(parameter.numel() for parameter in model.parameters())
    assert counts.total == sum(counts.parameters.values())
    if isinstance(config.architecture, Stacked):
        assert counts.total == published_parameters(config)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_operations_are_those_that_torch_counts(name):
    """Torch counts attention over all T positions, causal or not; so here a token attends to T, and not to (T + 1) / 2."""
    config = ARCHITECTURES[name]
    length = config.context_length
    with torch.device("meta"):
        model = build(config.architecture, config.vocab_size, config.context_length)
        ids = torch.zeros(1, length, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(ids)
    assert counter.get_total_flops() == length * forward_flops(model, attended=length) + beyond_a_token(config, length)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_causal_attention_costs_half_of_the_square_and_a_diagonal(name):
    config = ARCHITECTURES[name]
    a = config.architecture
    if isinstance(a, Dense):
        dims = a.n_layers * 2 * a.d_model
    else:
        dims = sum(
            stack.layers * a.n_heads * (a.d_model // a.n_heads + min(stack.features, a.d_model // a.n_heads)) for stack in a.stacks
        )
    short, long = (count(a, config.vocab_size, length).forward_flops_per_token for length in (1, config.context_length))
    assert long - short == dims * (config.context_length - 1)  # 2 * dims * ((T + 1) / 2 - 1)


def test_training_costs_three_forwards():
    config = PRESETS["seed-2x64"]
    counts = count(config.architecture, config.vocab_size, config.context_length)
    assert counts.training_flops_per_token == 3 * counts.forward_flops_per_token
    assert counts.forward_flops_per_token == pytest.approx(793e6, rel=0.005)


def test_a_tied_head_is_no_parameter_but_is_multiplied():
    tied, untied = (count(replace(DENSE, tie_embeddings=tied), 300, 24) for tied in (True, False))
    assert tied.parameters["head"] == 0
    assert untied.total - tied.total == 48 * 300
    assert tied.forward_flops_per_token == untied.forward_flops_per_token


STACKED = Stacked(d_model=16, n_heads=2, stacks=(Stack(4, 4, 24), Stack(4, 8, 32)))


def test_a_packed_model_is_grouped_by_what_its_parameters_do():
    found = roles(build(STACKED, 30, 8))
    assert found["embedding.weight"] == "embedding"
    assert found["head.weight"] == "head"
    assert found["head.bias"] == "vector"
    assert found["stacks.1.attention.query.weight"] == "matrix"
    assert found["stacks.1.attention.query.bias"] == "vector"
    assert found["stacks.1.layer_ffn.norm.weight"] == "vector"
    assert found["stacks.0.mix.expand.weight"] == "matrix"
    assert found["stacks.1.norm.weight"] == "vector"


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("activation", ["relu2", "swiglu"])
def test_every_parameter_of_a_dense_model_has_a_role(activation, tied):
    model = build(Dense(d_model=16, n_heads=2, n_layers=2, d_ff=32, ffn=activation, tie_embeddings=tied), 30, 8)
    found = roles(model)
    assert found.keys() == {name for name, _ in model.named_parameters()}
    assert ("head.weight" in found) is not tied
    for name, parameter in model.named_parameters():
        assert (found[name] == "vector") is (parameter.ndim == 1), name


def test_packed_vectors_and_matrices_have_one_dimension_more():
    model = build(STACKED, 30, 8)
    found = roles(model)
    packed = {
        name: parameter.ndim for name, parameter in model.named_parameters() if ".attention." in name or ".layer_ffn." in name
    }
    assert packed and all(ndim == {"vector": 2, "matrix": 3}[found[name]] for name, ndim in packed.items())


def test_an_unknown_module_is_named():
    model = nn.Sequential(nn.Conv1d(2, 2, 3))
    with pytest.raises(KeyError, match=r"0\.weight: no role is written down for `weight` of Conv1d"):
        roles(model)


V, T = 300, 64
S, N, C, H, D, F = 3, 6, 48, 4, 8, 100
W, K, NARROW = N * D, C // H, 6
LAST = 4 * W
BASE = Stacked(C, H, (Stack(N, D, F),) * S)
WIDE = replace(BASE, stacks=(*BASE.stacks[:-1], Stack(N, 4 * D, F)))
FOLDED = replace(BASE, attention=FactoredAttention())
RELU2 = replace(BASE, ffn="relu2")
DYNAMIC = [  # a norm, weights and biases for each earlier output, before every stack but the first and before the head
    sum(2 * width + reads * (width + 1) for reads, width in enumerate([*[C] * (S - 1), W], start=1)),
    sum(2 * reads * width for reads, width in enumerate([*[C] * (S - 1), W], start=1)),
]
FURTHER_KEYS = (2 * C + (T + 1) / 2) * -2 * S * N * H * (K - NARROW)


@pytest.mark.parametrize(
    ("base", "change", "parameters", "operations"),
    [
        (BASE, {"residual": True}, 0, 0),
        (BASE, {"skip_connections": "input"}, C * (S - 1), 0),
        (BASE, {"skip_connections": "dense"}, C * S * (S - 1) // 2, 0),
        (BASE, {"skip_connections": "dynamic"}, DYNAMIC[0], DYNAMIC[1]),
        (BASE, {"conv_size": 2}, S * C, 0),
        (BASE, {"conv_size": 4}, S * 3 * C, 0),
        (BASE, {"ffn": "relu2"}, S * (W**2 + 2 * W - F - N * (8 * D**2 + 7 * D)), S * 2 * (W**2 - 8 * N * D**2)),
        (RELU2, {"ffn": "swiglu"}, S * W * F, S * 2 * W * F),
        (BASE, {"attention": FactoredAttention()}, S * N * (H * C * D - 2 * C**2 - 4 * C - D), 0),
        (FOLDED, {"attention": FactoredAttention(qk_head_dim=NARROW)}, S * -2 * N * C * H * (K - NARROW), FURTHER_KEYS),
        (FOLDED, {"attention": FactoredAttention(rope=True)}, 0, 0),
        (FOLDED, {"attention": FactoredAttention(qk_norm=True)}, S * 2 * K, 0),
        (WIDE, {"tie_embeddings": True}, LAST * C - V * (LAST + 1), 2 * (LAST * C - V * (LAST - C))),
    ],
)
def test_a_setting_adds_what_the_table_says(base, change, parameters, operations):
    before, after = (count(architecture, V, T) for architecture in (base, replace(base, **change)))
    assert after.total - before.total == parameters
    assert after.forward_flops_per_token - before.forward_flops_per_token == operations


def test_shared_keys_and_values_save_those_of_all_layers_but_one():
    shared = replace(FOLDED, attention=FactoredAttention(kv_sharing="stack"))
    saved = S * (-(N - 1) * C * H * K + C**2 + N * C * D * (1 - H))
    assert count(shared, V, T).total - count(FOLDED, V, T).total == saved
