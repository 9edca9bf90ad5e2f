import pytest
import torch
import torch.nn.functional as F

from stacklm.config.model import Stack, Stacked
from stacklm.model.build import build
from stacklm.model.dense import SquaredReLU
from stacklm.model.wiring import Last, Read, Replace, Residual, ResidualFeedForward, ShortConvolution

VOCAB, CONTEXT = 30, 12


def built(**settings):
    torch.manual_seed(0)
    return build(Stacked(width=16, heads=2, stacks=(Stack(4, 4, 24),) * 3, **settings), VOCAB, CONTEXT)


@pytest.mark.parametrize("reach", [1, 3])
def test_a_short_convolution_is_the_sum_over_its_reach(reach):
    convolution = ShortConvolution(5, reach)
    torch.nn.init.normal_(convolution.weight)
    x = torch.randn(2, 8, 5)
    for t in range(8):
        wanted = x[:, t] + sum(convolution.weight[i - 1] * x[:, t - i] for i in range(1, reach + 1) if t >= i)
        assert torch.allclose(convolution(x)[:, t], wanted, atol=1e-6)


def test_a_convolution_slides_over_tokens_that_follow_others():
    convolution = ShortConvolution(5, 3)
    torch.nn.init.normal_(convolution.weight)
    x = torch.randn(2, 8, 5)
    assert torch.allclose(convolution.slide(x[:, 2:]), convolution(x)[:, 5:], atol=1e-6)


def test_a_read_adds_the_first_others_to_the_latest():
    outputs = [torch.randn(2, 4, 5) for _ in range(4)]
    assert Last()(outputs) is outputs[3]
    for others in (1, 3):
        read = Read(others, 5)
        assert torch.equal(read(outputs), outputs[3])
        torch.nn.init.normal_(read.weight)
        assert torch.allclose(read(outputs), outputs[3] + sum(read.weight[i] * outputs[i] for i in range(others)), atol=1e-6)


def test_a_residual_fills_the_first_channels_of_a_wider_output():
    x, y = torch.randn(2, 4, 3), torch.randn(2, 4, 5)
    assert Replace()(x, y) is y
    joined = Residual()(x, y)
    assert torch.equal(joined[..., :3], x + y[..., :3])
    assert torch.equal(joined[..., 3:], y[..., 3:])


def test_a_residual_feed_forward_reads_a_normalised_input_and_drops_only_what_it_adds():
    torch.manual_seed(0)
    block = ResidualFeedForward(8, SquaredReLU(8, 16), dropout=0.5)
    torch.nn.init.normal_(block.feed_forward.down.weight)
    x = 5 * torch.randn(2, 6, 8)
    wanted = block.feed_forward(F.layer_norm(x, (8,)))
    assert torch.allclose(block.eval()(x), x + wanted, atol=1e-5)
    added = block.train()(x) - x
    kept = ~torch.isclose(added, torch.zeros(()), atol=1e-6)
    assert 0.3 < kept.double().mean() < 0.7
    assert torch.allclose(added[kept], 2 * wanted[kept], atol=1e-4)


@pytest.mark.parametrize("feed_forward", ["micro", "relu2", "swiglu"])
@pytest.mark.parametrize("reads", ["previous", "first", "all"])
def test_residual_stacks_add_nothing_at_the_start(feed_forward, reads):
    model = built(join="residual", feed_forward=feed_forward, reads=reads, convolution=4)
    ids = torch.arange(CONTEXT)[None]
    x_0 = model.place(model.embedding_norm(model.embedding(ids)))
    assert torch.equal(model.features(ids), model.norm(x_0))


@pytest.mark.parametrize(("reads", "others"), [("previous", [0, 0, 0]), ("first", [0, 1, 1]), ("all", [0, 1, 2])])
def test_a_stack_reads_what_the_setting_says(reads, others):
    model = built(reads=reads)
    assert [len(read.weight) if isinstance(read, Read) else 0 for read in model.reads] == others


def test_reads_reach_the_stack_they_belong_to():
    model = built(reads="all")
    for read in model.reads[1:]:
        torch.nn.init.normal_(read.weight)
    ids = torch.arange(CONTEXT)[None]
    x_0 = model.place(model.embedding_norm(model.embedding(ids)))
    x_1 = model.stacks[0](x_0)
    x_2 = model.stacks[1](x_1 + model.reads[1].weight[0] * x_0)
    x_3 = model.stacks[2](x_2 + model.reads[2].weight[0] * x_0 + model.reads[2].weight[1] * x_1)
    assert torch.allclose(model.features(ids), model.norm(x_3), atol=1e-6)


def test_a_wide_output_is_narrowed_for_the_tied_head():
    torch.manual_seed(0)
    model = build(Stacked(width=16, heads=2, stacks=(Stack(4, 16, 24),), head="tied"), VOCAB, CONTEXT)
    ids = torch.arange(CONTEXT)[None]
    x = model.norm(model.stacks[0](model.place(model.embedding_norm(model.embedding(ids)))))
    assert x.shape[-1] == 64
    assert torch.allclose(model(ids), x @ model.narrow.weight.T @ model.embedding.weight.T, atol=1e-6)
    assert "head.weight" not in dict(model.named_parameters())


def test_a_stack_that_the_context_asks_for_counts_as_depth_from_the_start():
    def spread(context):
        torch.manual_seed(0)
        model = build(Stacked(width=16, heads=2, stacks=(Stack(4, 4, 24),) * 2, stack_every=8), VOCAB, context)
        assert len(model.stacks) == len(model.reads)
        return len(model.stacks), model.stacks[0].layers.attention.output.weight.std().item()

    (few, large), (many, small) = spread(8), spread(56)
    assert (few, many) == (2, 8)
    assert small / large == pytest.approx(0.5, rel=1e-4)
