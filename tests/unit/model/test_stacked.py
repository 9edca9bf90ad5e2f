import pytest
import torch
import torch.nn.functional as F
from torch import nn

from stacklm.config.model import Stack, Stacked
from stacklm.model.build import build
from stacklm.model.dense import Attention
from stacklm.model.layers import Positions, rotations, sinusoids
from stacklm.model.stacked import FactoredAttention, PublishedAttention, QKTransforms, SharedAttention, StackedDecoder
from support.model_variants import CONTEXT, VOCAB, loss_of, overfit, scattered
from support.reference import ReferenceDecoder, unpack
from support.rounding import assert_same, rounding, terms_of

pytestmark = pytest.mark.numerical

NARROW = Stacked(d_model=16, n_heads=2, stacks=(Stack(4, 4, 24), Stack(4, 8, 32)))  # D <= K = 8
WIDE = Stacked(d_model=16, n_heads=4, stacks=(Stack(2, 8, 24), Stack(2, 8, 32), Stack(3, 7, 16)))  # D > K = 4, an odd last width
SINGLE = Stacked(d_model=16, n_heads=2, stacks=(Stack(1, 16, 24), Stack(1, 16, 24)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("config", [NARROW, WIDE, SINGLE])
def test_packed_equals_the_plain_loop(config, dtype):
    torch.manual_seed(0)
    model = scattered(StackedDecoder(config, VOCAB, CONTEXT).to(dtype))
    reference = ReferenceDecoder(config, VOCAB, CONTEXT).to(dtype)
    reference.load_state_dict(unpack(model.state_dict()))
    ids = torch.randint(VOCAB, (3, CONTEXT + 1))
    terms = terms_of(model, CONTEXT)
    assert_same(model(ids[:, 1:]), reference(ids[:, 1:]), terms)
    loss_of(model, ids).backward()
    loss_of(reference, ids).backward()
    packed = unpack({name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad})
    assert packed.keys() == {name for name, _ in reference.named_parameters() if not name.endswith("key.bias")}
    for name, parameter in reference.named_parameters():
        if name.endswith("key.bias"):  # it adds the same to all scores of a row, which the softmax takes away
            assert parameter.grad.norm() < rounding(dtype, terms) * packed[name.replace("key", "query")].norm()
        else:
            assert_same(packed[name], parameter.grad, terms, name)


def test_only_the_key_biases_are_not_trained_and_they_stay_as_they_are():
    torch.manual_seed(0)
    model = StackedDecoder(NARROW, VOCAB, CONTEXT)
    still = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert still == {f"stacks.{s}.attention.key.bias" for s in range(2)}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        loss_of(model, torch.randint(VOCAB, (4, CONTEXT + 1))).backward()
        optimizer.step()
    assert not any(model.get_parameter(name).any() for name in still)


def test_the_cases_cover_both_ways_of_folding():
    stacks = [stack for config in (NARROW, WIDE) for stack in StackedDecoder(config, VOCAB, CONTEXT).stacks]
    assert {stack.attention.folds_values for stack in stacks} == {True, False}


def test_layers_differ_at_the_start():
    model = StackedDecoder(NARROW, VOCAB, CONTEXT)
    x = torch.randn(1, 6, 16)
    r = model.stacks[0].attention(x)
    y = r + model.stacks[0].layer_ffn(r)
    for n in range(1, 4):
        assert not torch.allclose(y[..., 0, :], y[..., n, :], atol=0.1)


def test_every_stack_keeps_the_size_of_its_input():
    torch.manual_seed(0)
    config = Stacked(d_model=64, n_heads=4, stacks=(Stack(8, 8, 256),) * 4)
    model = StackedDecoder(config, VOCAB, 64)
    x = torch.randn(4, 64, 64)
    for stack in model.stacks:
        x = stack(x)
        assert 0.5 < x.std() < 2


def test_it_overfits_one_batch():
    torch.manual_seed(0)
    model = StackedDecoder(NARROW, VOCAB, CONTEXT)
    assert overfit(model) < 0.05


def built(*stacks, **settings):
    torch.manual_seed(0)
    return build(Stacked(d_model=16, n_heads=2, stacks=stacks or (Stack(4, 4, 24),) * 3, **settings), VOCAB, CONTEXT)


def x_0_of(model, ids):
    x = model.embedding_norm(model.embedding(ids))
    return x + sinusoids(model.positions(ids), x.shape[-1])


def test_a_residual_fills_the_first_channels_of_a_wider_output():
    stack = built(Stack(4, 8, 24), residual=True).stacks[0]
    x = torch.randn(2, 5, 16)
    assert torch.equal(stack(x), F.pad(x, (0, 16)))
    torch.nn.init.normal_(stack.mix.contract.weight)
    r = stack.attention(x)
    assert_same(stack(x), F.pad(x, (0, 16)) + stack.mix((r + stack.layer_ffn(r)).flatten(2)), terms_of(stack, 5))


def test_a_feed_forward_reads_a_normalised_input():
    stack = built(ffn="relu2").stacks[0]
    torch.nn.init.normal_(stack.ffn.down.weight)
    x = torch.randn(2, 6, 16)
    y = stack.mix(stack.attention(x).flatten(2))
    assert_same(stack(x), y + stack.ffn(F.layer_norm(y, (16,))), terms_of(stack, 6))


@pytest.mark.parametrize("feed_forward", ["per_layer", "relu2", "swiglu"])
@pytest.mark.parametrize("reads", ["none", "input", "dense", "dynamic"])
def test_residual_stacks_add_nothing_at_the_start(feed_forward, reads):
    model = built(residual=True, ffn=feed_forward, skip_connections=reads, conv_size=4)
    ids = torch.arange(CONTEXT)[None]
    x_0 = x_0_of(model, ids)
    assert torch.equal(model.features(ids), model.norm(x_0))


@pytest.mark.parametrize(("reads", "others"), [("none", None), ("input", [1, 1]), ("dense", [1, 2])])
def test_a_stack_behind_the_first_reads_what_the_setting_says(reads, others):
    skips = built(skip_connections=reads).skips
    assert (skips and [len(skip.weight) for skip in skips]) == others


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("reads", ["input", "dense", "dynamic"])
def test_skips_reach_the_stack_they_belong_to_and_dynamic_ones_the_head(reads, residual):
    model = scattered(built(skip_connections=reads, residual=residual))
    ids = torch.arange(CONTEXT)[None]
    outputs = [x_0_of(model, ids)]
    for stack, skip in zip(model.stacks, [lambda found: found[0], *model.skips[:2]], strict=True):
        outputs.append(stack(skip(outputs)))
    last = model.skips[2](outputs) if reads == "dynamic" else outputs[-1]
    assert_same(model.features(ids), model.norm(last), terms_of(model, CONTEXT))
    plain = built(residual=residual)
    plain.load_state_dict(model.state_dict(), strict=False)
    assert not torch.allclose(model.features(ids), plain.features(ids), atol=1e-2)


def test_a_wide_output_is_projected_for_the_tied_head():
    model = built(Stack(4, 16, 24), tie_embeddings=True)
    ids = torch.arange(CONTEXT)[None]
    x = model.norm(model.stacks[0](x_0_of(model, ids)))
    assert x.shape[-1] == 64
    assert_same(model(ids), x @ model.out_proj.weight.T @ model.embedding.weight.T, terms_of(model, CONTEXT))
    assert "head.weight" not in dict(model.named_parameters())


def test_a_stack_that_the_context_asks_for_counts_as_depth_from_the_start():
    def spread(context):
        torch.manual_seed(0)
        model = build(Stacked(d_model=16, n_heads=2, stacks=(Stack(4, 4, 24),) * 2, tokens_per_extra_stack=8), VOCAB, context)
        return len(model.stacks), model.stacks[0].attention.output.weight.std().item()

    (few, large), (many, small) = spread(8), spread(56)
    assert (few, many) == (2, 8)
    assert small / large == pytest.approx(0.5, rel=1e-4)


PLAIN = QKTransforms(8)


@pytest.mark.parametrize("features", [4, 8, 12])  # below, at and above K = 8
def test_the_published_attention_folded_equals_the_same_unfolded(features):
    attention = scattered(PublishedAttention(3, 16, 2, features, depth=2).double())
    x = torch.randn(2, CONTEXT, 16, dtype=torch.float64, requires_grad=True)
    direction = torch.randn(2, CONTEXT, 3, features, dtype=torch.float64)
    wanted = {"x": x} | {name: p for name, p in attention.named_parameters() if p.requires_grad}
    folded, unfolded = attention(x), attention.unfolded(x)
    terms = terms_of(attention, CONTEXT)
    assert_same(folded, unfolded, terms)
    found, plain = (torch.autograd.grad((form * direction).sum(), list(wanted.values())) for form in (folded, unfolded))
    for name, a, b in zip(wanted, found, plain, strict=True):
        assert_same(a, b, terms, name)


def test_a_single_published_layer_is_dense_attention():
    """N = 1 with D = C is torch's own multi-head attention, a residual and a linear map."""
    width, heads = 16, 2
    torch.manual_seed(0)
    layer = scattered(PublishedAttention(1, width, heads, width, depth=1).double(), 0.1)
    dense = nn.MultiheadAttention(width, heads, batch_first=True, dtype=torch.float64)
    projections = (layer.query, layer.key, layer.value)
    dense.in_proj_weight.data = torch.cat([part.weight[0] for part in projections])
    dense.in_proj_bias.data = torch.cat([part.bias[0] for part in projections])
    dense.out_proj.weight.data, dense.out_proj.bias.data = layer.output.weight[0], layer.output.bias[0]
    x = torch.randn(2, 9, width, dtype=torch.float64)
    a, _ = dense(x, x, x, attn_mask=nn.Transformer.generate_square_subsequent_mask(9, dtype=torch.float64), is_causal=True)
    wanted = F.linear(x + a, layer.reduce.weight[0], layer.reduce.bias[0])
    assert_same(layer(x)[:, :, 0], wanted, terms_of(layer, CONTEXT))


@pytest.mark.parametrize("kind", [FactoredAttention, SharedAttention])
def test_a_single_layer_is_the_attention_of_the_dense_twin(kind):
    """N = 1 and D = C, with the dense one's value and output maps in one, or one after the other; and the residual's way shut."""
    width, heads = 16, 2
    dense = Attention(width, heads)
    transforms = QKTransforms(width // heads, qk_norm=True, rope=True)
    layer = kind(1, width, heads, width, 1, width // heads, transforms).double()
    scattered(dense.double())
    layer.query.weight.data = dense.query.weight.data[None]
    transforms.query_norm.weight.data, transforms.key_norm.weight.data = dense.query_norm.weight.data, dense.key_norm.weight.data
    layer.reduce.weight.data.zero_()
    if kind is FactoredAttention:
        layer.key.weight.data = dense.key.weight.data[None]
        outputs_HCK = dense.output.weight.unflatten(1, (heads, -1)).transpose(0, 1)
        layer.value.weight.data = (outputs_HCK @ dense.value.weight.unflatten(0, (heads, -1))).flatten(0, 1)[None].data
    else:
        layer.key.weight.data, layer.value.weight.data = dense.key.weight.data, dense.value.weight.data
        layer.output.weight.data = dense.output.weight.data[None]
    x = torch.randn(2, CONTEXT, width, dtype=torch.float64)
    rotation = rotations(Positions(CONTEXT)(x), width // heads)
    assert_same(layer(x, rotation)[:, :, 0], dense(x, rotation), terms_of(layer, CONTEXT))


def test_the_published_attention_without_biases_is_a_factored_one():
    layers, width, heads, features = 3, 16, 2, 4
    published = PublishedAttention(layers, width, heads, features, depth=2).double()
    factored = FactoredAttention(layers, width, heads, features, 2, width // heads, PLAIN).double()
    factored.query.weight.data, factored.key.weight.data = published.query.weight.data, published.key.weight.data
    factored.reduce.weight.data = published.reduce.weight.data
    factored.value.weight.data = published.fold().value.unflatten(0, (layers, -1)).data
    x = torch.randn(2, CONTEXT, width, dtype=torch.float64)
    assert_same(factored(x), published(x), terms_of(published, CONTEXT))


@pytest.mark.parametrize("kind", [FactoredAttention, SharedAttention])
def test_attention_starts_as_large_as_the_published_one_and_smaller_with_serial_depth(kind):
    def attended(kind, depth, layers=8, **keywords):
        torch.manual_seed(0)
        x = torch.randn(4, 2, 128)
        attention = kind(layers, 128, 4, 16, depth, **keywords)
        return (attention(x) - attention.reduce.shared(x)).std().item()

    own = {"key_dim": 32, "transforms": QKTransforms(32)}
    assert attended(kind, 2, **own) == pytest.approx(attended(PublishedAttention, 2), rel=0.2)
    assert attended(kind, 8, **own) / attended(kind, 2, **own) == pytest.approx(0.5, rel=1e-3)
    assert attended(kind, 2, layers=2, **own) == pytest.approx(attended(kind, 2, layers=32, **own), rel=0.2)


def test_layers_that_share_keys_see_the_same_and_make_their_own_of_it():
    attention = SharedAttention(3, 16, 2, 4, 1, 8, PLAIN)
    q, k, v = attention.project(torch.randn(2, CONTEXT, 16))
    assert q.shape[2] == 6 and k.shape[2] == v.shape[2] == 2
    attention.query.weight.data[1:] = attention.query.weight.data[:1]
    r = attention(torch.randn(2, CONTEXT, 16))
    assert not torch.allclose(r[:, :, 0], r[:, :, 1], atol=0.1)
    attention.output.weight.data[1:] = attention.output.weight.data[:1]
    attention.reduce.weight.data[1:] = attention.reduce.weight.data[:1]
    r = attention(torch.randn(2, CONTEXT, 16))
    assert_same(r[:, :, 0], r[:, :, 1], terms_of(attention, CONTEXT))


def test_normalised_queries_and_keys_do_not_change_with_their_length():
    norm = QKTransforms(8, qk_norm=True)
    norm.query_norm.weight.data.fill_(2)
    q, k = torch.randn(2, 2, 5, 3, 8)
    large, small = norm(100 * q, 100 * k, None), norm(q, k, None)
    for a, b in zip(large, small, strict=True):  # eps is added to a mean square of about 1, or of 10,000
        assert_same(a, b, 8)
    assert small[0].norm(dim=-1).mean().item() == pytest.approx(2 * 8**0.5, rel=1e-3)
    assert small[1].norm(dim=-1).mean().item() == pytest.approx(8**0.5, rel=1e-3)
