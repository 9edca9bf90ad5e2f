"""Activation checkpointing."""

import pytest
import torch
import torch.nn.functional as F

from stacklm.config.model import Dense, Stack, Stacked
from stacklm.model.build import build
from support.model_variants import CONTEXT, VARIANTS, VOCAB, gradients, loss_of, scattered
from support.operations import Operations
from support.rounding import assert_same, terms_of

pytestmark = pytest.mark.numerical

ATTENTION, BACKWARD = torch.ops.stacklm.blocked_attention.default, torch.ops.stacklm.blocked_attention_backward.default
DENSE = Dense(d_model=16, n_heads=2, n_layers=2, d_ff=24)


def twins(config, dtype=torch.float64):
    """A model and one of the same weights with activation checkpointing."""
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(scattered(build(config, VOCAB, CONTEXT).to(dtype)))
    models[1].activation_checkpointing = True
    return models


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", [*VARIANTS, "dense"])
def test_it_changes_neither_outputs_nor_gradients(name, dtype):
    whole, checkpointed = twins((VARIANTS | {"dense": DENSE})[name], dtype)
    ids = torch.randint(VOCAB, (2, CONTEXT + 1))
    terms = terms_of(whole, CONTEXT)
    assert_same(checkpointed(ids[:, 1:]), whole(ids[:, 1:]), terms)
    found = gradients(checkpointed, ids)
    for parameter, gradient in gradients(whole, ids).items():
        assert_same(found[parameter], gradient, terms, parameter)


def saved_bytes(model, ids):
    """What the forward pass keeps for the backward pass besides the parameters, each storage once."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = loss_of(model, ids)
    assert loss.requires_grad
    return sum(kept.values())


def test_it_keeps_little_for_the_backward_pass():
    config = Stacked(d_model=64, n_heads=4, stacks=(Stack(16, 4, 64), Stack(16, 4, 64)))
    whole, checkpointed = twins(config)
    ids = torch.randint(VOCAB, (8, CONTEXT + 1))
    assert saved_bytes(checkpointed, ids) < 0.25 * saved_bytes(whole, ids)


def test_dropout_is_the_same_when_it_is_computed_again():
    config = Stacked(d_model=16, n_heads=2, stacks=(Stack(4, 4, 24),), dropout=0.5)
    _, checkpointed = twins(config)
    ids = torch.randint(VOCAB, (2, CONTEXT))
    trained = [parameter for parameter in checkpointed.parameters() if parameter.requires_grad]
    direction = [torch.randn_like(parameter) for parameter in trained]

    def loss_at(step):
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter, along in zip(trained, direction, strict=True):
                parameter.add_(along, alpha=step)
        return F.cross_entropy(checkpointed(ids).flatten(0, 1), ids.flatten())

    slopes = torch.autograd.grad(loss_at(0), trained)
    slope = sum((g * d).sum() for g, d in zip(slopes, direction, strict=True))
    step = torch.finfo(torch.float64).eps ** (1 / 3)  # where truncation and rounding are alike
    measured = (loss_at(step) - loss_at(-2 * step)) / (2 * step)
    assert measured.item() == pytest.approx(slope.item(), rel=1e-5)


def test_projections_are_computed_again_but_not_attention():
    config = Stacked(d_model=16, n_heads=2, stacks=(Stack(4, 4, 24),))
    _, checkpointed = twins(config)
    ids = torch.randint(VOCAB, (2, CONTEXT + 1))
    with Operations() as calls:
        loss = loss_of(checkpointed, ids)
        forward = calls.counts.copy()
        loss.backward()
    assert forward[ATTENTION] == calls.counts[ATTENTION] == 1
    assert calls.counts[BACKWARD] == 1
