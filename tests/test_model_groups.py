from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from model_family import CONTEXT, VARIANTS, VOCAB
from torch.utils._python_dispatch import TorchDispatchMode

from stacklm.config.model import Dense, Stack, Stacked
from stacklm.model.build import build
from stacklm.model.groups import in_groups

ATTENTION, BACKWARD = torch.ops.stacklm.blocked_attention.default, torch.ops.stacklm.blocked_attention_backward.default
every_variant = pytest.mark.parametrize("name", VARIANTS)


def twins(config, size, dtype=torch.float64):
    """A model that runs its layers at once and one of the same weights that runs them in groups."""
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(build(config, VOCAB, CONTEXT).to(dtype))
        with torch.no_grad():
            for parameter in models[-1].parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    in_groups(models[1], size)
    return models


def loss_of(model, ids):
    return F.cross_entropy(model(ids).flatten(0, 1), ids.flatten())


def relative_error(found, wanted):
    return (found - wanted).norm() / wanted.norm()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("size", [1, 3, 9])
@every_variant
def test_groups_change_neither_outputs_nor_gradients(name, size, dtype, tolerance):
    whole, grouped = twins(VARIANTS[name], size, dtype)
    ids = torch.randint(VOCAB, (2, CONTEXT))
    assert relative_error(grouped(ids), whole(ids)) < tolerance
    for model in (whole, grouped):
        loss_of(model, ids).backward()
    gradients = dict(grouped.named_parameters())
    for parameter_name, parameter in whole.named_parameters():
        found, wanted = gradients[parameter_name].grad, parameter.grad
        if parameter_name.endswith("key.bias"):  # the softmax takes it away
            assert found.norm() < tolerance * gradients[parameter_name.replace("key", "query")].grad.norm()
        else:
            assert relative_error(found, wanted) < tolerance, parameter_name


def test_groups_change_no_name():
    whole, grouped = twins(VARIANTS["base"], 2)
    assert whole.state_dict().keys() == grouped.state_dict().keys()


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


def test_groups_keep_little_for_the_backward_pass():
    config = Stacked(width=64, heads=4, stacks=(Stack(16, 4, 64), Stack(16, 4, 64)))
    whole, grouped = twins(config, 4)
    ids = torch.randint(VOCAB, (8, CONTEXT))
    assert saved_bytes(grouped, ids) < 0.25 * saved_bytes(whole, ids)


def test_dropout_is_the_same_when_it_is_computed_again():
    config = Stacked(width=16, heads=2, stacks=(Stack(4, 4, 24),), dropout=0.5)
    _, grouped = twins(config, 2)
    ids = torch.randint(VOCAB, (2, CONTEXT))
    direction = [torch.randn_like(parameter) for parameter in grouped.parameters()]

    def loss_at(step):
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter, along in zip(grouped.parameters(), direction, strict=True):
                parameter.add_(along, alpha=step)
        return loss_of(grouped, ids)

    slope = sum((g * d).sum() for g, d in zip(torch.autograd.grad(loss_at(0), list(grouped.parameters())), direction, strict=True))
    step = 1e-6
    measured = (loss_at(step) - loss_at(-2 * step)) / (2 * step)
    assert measured.item() == pytest.approx(slope.item(), rel=1e-5)


class Calls(TorchDispatchMode):
    """Counts how often each operation really runs."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.counts[operation] += 1
        return operation(*args, **(kwargs or {}))


def test_projections_are_computed_again_but_not_attention():
    config = Stacked(width=16, heads=2, stacks=(Stack(4, 4, 24),))
    _, grouped = twins(config, 2)
    ids = torch.randint(VOCAB, (2, CONTEXT))
    with Calls() as calls:
        loss = loss_of(grouped, ids)
        forward = calls.counts.copy()
        loss.backward()
    assert forward[ATTENTION] == calls.counts[ATTENTION] == 2
    assert calls.counts[BACKWARD] == 2


def test_a_dense_model_has_no_groups():
    whole, grouped = twins(Dense(width=16, heads=2, layers=2, hidden=24), 2)
    ids = torch.randint(VOCAB, (2, CONTEXT))
    assert torch.equal(whole(ids), grouped(ids))
