"""Properties that must hold for every variant."""

import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from stacklm.audit.causality import CHECKS
from stacklm.audit.probe import Probe
from stacklm.config.model import Stack, Stacked
from stacklm.model.build import ModelConfig, build
from stacklm.model.cache import Decoder
from stacklm.model.count import count, forward_flops, roles
from stacklm.model.kernels.attention import causal_attention
from stacklm.model.stacked import FactoredAttention, SharedAttention
from stacklm.model.store import load_model, save_model
from stacklm.model.variants import grid, variants
from support.model_variants import BASES, CONTEXT, TINY, VARIANTS, VOCAB, gradients, loss_of, scattered
from support.reference import LAYERS, InLoops, in_loops
from support.rounding import assert_same, terms_of

every_variant = pytest.mark.parametrize("name", VARIANTS)


def fresh(name, seed=0):
    torch.manual_seed(seed)
    return build(VARIANTS[name], VOCAB, CONTEXT)


def attentions(model):
    return [module for module in model.modules() if type(module) in LAYERS]


@pytest.mark.numerical
@every_variant
def test_packed_equals_loops_over_layers_and_heads(name):
    model = scattered(fresh(name).double())
    looped = in_loops(model)
    assert attentions(model) and len([m for m in looped.modules() if isinstance(m, InLoops)]) == len(attentions(model))
    ids = torch.randint(VOCAB, (3, CONTEXT + 1))
    terms = terms_of(model, CONTEXT)
    assert_same(model(ids[:, 1:]), looped(ids[:, 1:]), terms)
    packed, loops = gradients(model, ids), gradients(looped, ids)
    assert len(packed) == len(loops)
    for parameter, gradient in loops.items():
        found = packed[parameter.replace(".packed.", ".")]
        assert_same(found, gradient, terms, parameter)


@pytest.mark.numerical
@every_variant
def test_packed_equals_loops_as_far_as_single_precision_goes(name):
    model = scattered(fresh(name))
    ids = torch.randint(VOCAB, (3, CONTEXT + 1))
    assert_same(model(ids[:, 1:]), in_loops(model)(ids[:, 1:]), terms_of(model, CONTEXT))
    packed, loops = (
        torch.cat([gradient.flatten() for gradient in gradients(form, ids).values()]) for form in (model, in_loops(model))
    )
    assert_same(packed, loops, terms_of(model, CONTEXT))


def prove(model):
    """Raise the fault of a model that is not causal, in whichever of the audit's checks."""
    probe = Probe(copy.deepcopy(model), VOCAB, CONTEXT)
    for check in CHECKS:
        check(probe)


@every_variant
def test_one_batch_is_overfit_and_the_trained_model_is_causal(name):
    model = fresh(name)
    prove(model)
    ids = torch.randint(VOCAB, (4, CONTEXT + 1))
    optimizer, steps = torch.optim.AdamW(model.parameters(), lr=1e-2), 0
    while loss_of(model, ids) > 0.1:
        assert (steps := steps + 10) <= 150
        for _ in range(10):
            gradients(model, ids)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    prove(model)


@every_variant
def test_every_parameter_has_a_role_and_learns_by_the_third_step(name):
    model = fresh(name)
    found = roles(model)
    assert found.keys() == {name for name, _ in model.named_parameters()}
    assert {role for role in found.values()} == {"embedding", "matrix", "vector", *({"head"} if "head.weight" in found else ())}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):  # behind a zero that is behind another
        still = {name for name, gradient in gradients(model, torch.randint(VOCAB, (4, CONTEXT + 1))).items() if not gradient.any()}
        optimizer.step()
    assert not still


@every_variant
def test_the_first_loss_is_close_to_a_guess_and_follows_the_seed(name):
    ids = torch.randint(VOCAB, (8, CONTEXT + 1))
    first, again, other = (loss_of(fresh(name, seed), ids).item() for seed in (1, 1, 2))
    assert first == again != other
    assert first == pytest.approx(torch.tensor(float(VOCAB)).log().item(), abs=0.3)


@pytest.mark.numerical
@every_variant
@pytest.mark.parametrize("pieces", [[1] * CONTEXT, [5, 1, 1, 5]], ids=str)
def test_cached_decoding_equals_the_full_forward(name, pieces):
    model = scattered(fresh(name).double()).eval()
    decoder = Decoder(model, CONTEXT)
    ids = torch.randint(VOCAB, (3, CONTEXT))
    features = torch.cat([decoder.features(piece) for piece in ids.split(pieces, dim=1)], dim=1)
    terms = terms_of(model, CONTEXT)
    assert_same(features, model.features(ids), terms)
    decoder.reset()
    assert_same(decoder.features(ids[:2, :4]), model.features(ids[:2, :4]), terms)


@every_variant
def test_counts_are_those_of_the_built_model(name):
    counts = count(VARIANTS[name], VOCAB, CONTEXT)
    parameters = dict(fresh(name).named_parameters())
    assert counts.total == sum(parameter.numel() for parameter in parameters.values())
    for role, number in counts.parameters.items():
        assert number == sum(parameters[name].numel() for name, kind in roles(fresh(name)).items() if kind == role)


def counted(function, *inputs):
    with FlopCounterMode(display=False) as counter:
        function(*inputs)
    return counter.get_total_flops()


@every_variant
def test_operations_around_the_attentions_are_those_that_torch_counts(name):
    """The attentions as published fold their weights once a step, which test_count.py knows."""
    model = fresh(name)
    measured = counted(model, torch.zeros(1, CONTEXT, dtype=torch.long))
    inside = sum(counted(attention, torch.zeros(1, CONTEXT, TINY.d_model)) for attention in attentions(model))
    said = forward_flops(model, attended=CONTEXT) - sum(forward_flops(part, attended=CONTEXT) for part in attentions(model))
    assert measured - inside == CONTEXT * said


@every_variant
def test_operations_of_folded_attentions_are_those_that_torch_counts(name):
    """Torch counts all T positions, causal or not; and some kernels pad narrow values or keys to the wider ones."""
    for attention in attentions(fresh(name)):
        if isinstance(attention, (FactoredAttention, SharedAttention)):
            x = torch.zeros(1, CONTEXT, TINY.d_model)
            q, k, v = attention.project(x)
            groups = q.shape[2] // k.shape[2]
            padded = counted(causal_attention, q, k.repeat(1, 1, groups, 1), v.repeat(1, 1, groups, 1))
            needed = 2 * q.shape[2] * (k.shape[3] + v.shape[3]) * CONTEXT * CONTEXT
            assert counted(attention, x) - padded + needed == CONTEXT * attention.flops_per_token(CONTEXT)


@every_variant
def test_weights_and_settings_survive_the_disk(tmp_path, name):
    model = scattered(fresh(name))
    save_model(tmp_path, model, VARIANTS[name], VOCAB, CONTEXT)
    loaded, config = load_model(tmp_path)
    assert config == ModelConfig(VARIANTS[name], VOCAB, CONTEXT)
    ids = torch.arange(CONTEXT)[None]
    assert torch.equal(loaded(ids), model(ids))


@pytest.mark.parametrize("base", BASES)
@every_variant
def test_every_variant_builds_at_every_size_without_memory(name, base):
    architecture, vocab_size, context = BASES[base]
    with torch.device("meta"):
        model = build(variants(architecture, context)[name], vocab_size, context)
        features = model.features(torch.zeros(1, context, dtype=torch.long))
    assert model.head.weight.shape == (vocab_size, features.shape[-1])
    assert features.shape[:2] == (1, context)


@every_variant
def test_a_window_longer_than_the_context_is_refused(name):
    with pytest.raises(ValueError, match=r"sequence of 13 tokens.*context of 12"):
        fresh(name)(torch.zeros(1, CONTEXT + 1, dtype=torch.long))


def test_each_variant_but_the_first_changes_the_model():
    assert VARIANTS["base"] == TINY
    assert len(set(VARIANTS.values())) == len(VARIANTS) == 17


def test_what_one_stack_can_not_have_is_left_out():
    one = Stacked(d_model=16, n_heads=2, stacks=(Stack(4, 4, 24),))
    assert VARIANTS.keys() - variants(one, CONTEXT).keys() == {"residual", "dense-skip", "modern", "modern-shared"}


@pytest.mark.parametrize("axis", ["parameters", "flops"])
@pytest.mark.parametrize("name", ["base", "modern"])
def test_a_grid_trades_parallel_layers_for_depth_at_one_budget(name, axis):
    architecture, vocab_size, context = BASES["laptop"]
    architecture = variants(architecture, context)[name]
    members = grid(architecture, vocab_size, context, axis)
    assert architecture in [member.architecture for member in members]
    wanted = count(architecture, vocab_size, context)
    shapes = []
    for member in members:
        stacks = member.architecture.stacks
        shapes.append((stacks[0].layers, len(stacks)))
        found = count(member.architecture, vocab_size, context)
        assert found == member.counts
        costs = [(c.total if axis == "parameters" else c.forward_flops_per_token) for c in (found, wanted)]
        assert member.mismatch == costs[0] / costs[1] - 1
        assert abs(member.mismatch) < 1e-3
        assert stacks[-1].width == architecture.stacks[-1].width
    assert [layers for layers, _ in shapes] == sorted((layers for layers, _ in shapes), reverse=True)
    assert shapes[0][1] == 1 and shapes[-1][0] == 1 and shapes[-1][1] > 2
