import pytest
import torch
import torch.nn.functional as F

from stacklm.config.model import Stack, Stacked
from stacklm.model.packed import FoldedOutputs, FoldedValues
from stacklm.model.reference import ReferenceDecoder, unpack
from stacklm.model.stacked import StackedDecoder

VOCAB, CONTEXT = 40, 12
NARROW = Stacked(width=16, heads=2, stacks=(Stack(4, 4, 24), Stack(4, 8, 32)))  # D <= K = 8
WIDE = Stacked(width=16, heads=4, stacks=(Stack(2, 8, 24), Stack(2, 8, 32), Stack(3, 7, 16)))  # D > K = 4, an odd last width
SINGLE = Stacked(width=16, heads=2, stacks=(Stack(1, 16, 24), Stack(1, 16, 24)))


def scattered(config, dtype=torch.float64):
    """A model in which no parameter is zero or one, so that each of them matters."""
    torch.manual_seed(0)
    model = StackedDecoder(config, VOCAB, CONTEXT).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def reference_of(model, config):
    reference = ReferenceDecoder(config, VOCAB, CONTEXT).to(next(model.parameters()).dtype)
    reference.load_state_dict(unpack(model.state_dict()))
    return reference


def loss_of(model, ids):
    return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


def relative_error(found, wanted):
    return (found - wanted).norm() / wanted.norm()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("config", [NARROW, WIDE, SINGLE])
def test_packed_equals_the_plain_loop(config, dtype, tolerance):
    model = scattered(config, dtype)
    reference = reference_of(model, config)
    ids = torch.randint(VOCAB, (3, CONTEXT + 1))
    assert relative_error(model(ids[:, 1:]), reference(ids[:, 1:])) < tolerance
    loss_of(model, ids).backward()
    loss_of(reference, ids).backward()
    packed = unpack({name: parameter.grad for name, parameter in model.named_parameters()})
    assert packed.keys() == {name for name, _ in reference.named_parameters()}
    for name, parameter in reference.named_parameters():
        if name.endswith("key.bias"):  # it adds the same to all scores of a row, which the softmax takes away
            assert packed[name].norm() < tolerance * packed[name.replace("key", "query")].norm()
        else:
            assert relative_error(packed[name], parameter.grad) < tolerance, name


def test_the_cases_cover_both_ways_of_folding():
    kinds = {type(stack.layers.attention) for config in (NARROW, WIDE) for stack in StackedDecoder(config, VOCAB, CONTEXT).stacks}
    assert kinds == {FoldedValues, FoldedOutputs}


def test_dropout_falls_on_the_small_feed_forward_only_in_training():
    config = Stacked(width=16, heads=2, stacks=NARROW.stacks, dropout=0.5)
    model = scattered(config)
    ids = torch.randint(VOCAB, (2, CONTEXT))
    assert not torch.equal(model(ids), model(ids))
    model.eval()
    assert relative_error(model(ids), reference_of(model, config).eval()(ids)) < 1e-10
    layers = model.stacks[0].layers
    r = torch.randn(2, 5, 4, 4, dtype=torch.float64)
    dropped = layers.feed_forward.train()(r)
    assert 0.3 < (dropped == 0).double().mean() < 0.7


def test_layers_differ_at_the_start():
    model = StackedDecoder(NARROW, VOCAB, CONTEXT)
    y = model.stacks[0].layers(torch.randn(1, 6, 16)).unflatten(-1, (4, 4))
    for n in range(1, 4):
        assert not torch.allclose(y[..., 0, :], y[..., n, :], atol=0.1)


def test_the_start_depends_on_the_seed_alone():
    def first_loss(seed):
        torch.manual_seed(seed)
        return loss_of(StackedDecoder(NARROW, VOCAB, CONTEXT), torch.arange(CONTEXT)[None])

    assert first_loss(1) == first_loss(1)
    assert first_loss(1) != first_loss(2)


def test_residual_branches_start_smaller_with_serial_depth_and_not_with_layers():
    def spread(stacks):
        torch.manual_seed(0)
        layers = StackedDecoder(Stacked(width=64, heads=2, stacks=stacks), VOCAB, CONTEXT).stacks[0].layers
        return layers.attention.output.weight.std().item(), layers.feed_forward.contract.weight.std().item()

    for shallow, deep in zip(spread((Stack(8, 8, 8),)), spread((Stack(8, 8, 8),) * 4), strict=True):
        assert deep / shallow == pytest.approx(0.5, rel=1e-4)
    few, many = spread((Stack(2, 32, 8),))[0], spread((Stack(32, 2, 8),))[0]
    assert few / many == pytest.approx(1, rel=0.1)


def test_every_stack_keeps_the_size_of_its_input():
    torch.manual_seed(0)
    config = Stacked(width=64, heads=4, stacks=(Stack(8, 8, 256),) * 4)
    model = StackedDecoder(config, VOCAB, 64)
    x = torch.randn(4, 64, 64)
    for stack in model.stacks:
        x = stack(x)
        assert 0.5 < x.std() < 2


def test_a_window_longer_than_the_context_is_refused():
    with pytest.raises(ValueError, match=r"window of 13 tokens.*context of 12"):
        StackedDecoder(NARROW, VOCAB, CONTEXT)(torch.zeros(1, 13, dtype=torch.long))


def test_one_batch_is_learned_by_heart():
    torch.manual_seed(0)
    model = StackedDecoder(NARROW, VOCAB, CONTEXT)
    ids = torch.randint(VOCAB, (4, CONTEXT + 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        loss_of(model, ids).backward()
        optimizer.step()
    assert loss_of(model, ids) < 0.05
