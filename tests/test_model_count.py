from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from stacklm.config.model import Dense, Stack, Stacked
from stacklm.config.params import load
from stacklm.model.build import ModelConfig, build
from stacklm.model.count import count, forward_flops
from stacklm.model.presets import PRESETS

SHIPPED = load(Path(__file__).parent.parent / "params.yaml")
VOCAB, CONTEXT = SHIPPED.tokenizer.vocab_size, SHIPPED.train.context
ARCHITECTURES = {
    **{name: ModelConfig(model.architecture, VOCAB, CONTEXT) for name, model in SHIPPED.models.items()},
    **PRESETS,
    "swiglu": ModelConfig(Dense(width=48, heads=3, layers=2, hidden=100, activation="swiglu"), 300, 24),
    "tied": ModelConfig(Dense(width=48, heads=3, layers=2, hidden=100, tied=True), 300, 24),
    "wide-features": ModelConfig(Stacked(width=32, heads=8, stacks=(Stack(2, 16, 40), Stack(3, 7, 50))), 300, 24),
}


def published_parameters(config: ModelConfig) -> int:
    """The published count of a stacked model."""
    a, v, c = config.architecture, config.vocab_size, config.architecture.width
    last = a.stacks[-1].width
    total = v * c + 2 * c + 2 * c * (len(a.stacks) - 1) + 2 * last + last * v + v
    for stack in a.stacks:
        n, d, w, h = stack.layers, stack.features, stack.width, stack.hidden
        total += n * (4 * c**2 + 4 * c + c * d + d + 2 * d + 8 * d**2 + 5 * d) + 2 * w * h + h + w
    return total


def beyond_a_token(config: ModelConfig, length: int) -> int:
    """What a stacked forward also multiplies: the folds, once, and the values' padding up to the head dim, a token and position."""
    if isinstance(config.architecture, Dense):
        return 0
    c, heads = config.architecture.width, config.architecture.heads
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
        model = build(config.architecture, config.vocab_size, config.context)
    counts = count(config.architecture, config.vocab_size, config.context)
    assert counts.total == sum(parameter.numel() for parameter in model.parameters())
    assert counts.total == sum(counts.parameters.values())
    if isinstance(config.architecture, Stacked):
        assert counts.total == published_parameters(config)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_operations_are_those_that_torch_counts(name):
    """Torch counts attention over all T positions, causal or not; so here a token attends to T, and not to (T + 1) / 2."""
    config = ARCHITECTURES[name]
    length = config.context
    with torch.device("meta"):
        model = build(config.architecture, config.vocab_size, config.context)
        ids = torch.zeros(1, length, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(ids)
    assert counter.get_total_flops() == length * forward_flops(model, attended=length) + beyond_a_token(config, length)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_causal_attention_costs_half_of_the_square_and_a_diagonal(name):
    config = ARCHITECTURES[name]
    a = config.architecture
    if isinstance(a, Dense):
        dims = a.layers * 2 * a.width
    else:
        dims = sum(stack.layers * a.heads * (a.width // a.heads + min(stack.features, a.width // a.heads)) for stack in a.stacks)
    short, long = (count(a, config.vocab_size, length).forward_flops_per_token for length in (1, config.context))
    assert long - short == dims * (config.context - 1)  # 2 * dims * ((T + 1) / 2 - 1)


def test_training_costs_three_forwards():
    config = PRESETS["seed-2x64"]
    counts = count(config.architecture, config.vocab_size, config.context)
    assert counts.training_flops_per_token == 3 * counts.forward_flops_per_token
    assert counts.forward_flops_per_token == pytest.approx(793e6, rel=0.005)


def test_a_tied_head_is_no_parameter_but_is_multiplied():
    tied, untied = (count(Dense(width=48, heads=3, layers=2, hidden=100, tied=tied), 300, 24) for tied in (True, False))
    assert tied.parameters["head"] == 0
    assert untied.total - tied.total == 48 * 300
    assert tied.forward_flops_per_token == untied.forward_flops_per_token
