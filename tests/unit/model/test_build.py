import pytest
import torch

from stacklm.config.params import load
from stacklm.model.build import PRESETS, build
from support import ROOT

SHIPPED = load(ROOT / "params.yaml")


@pytest.mark.parametrize("name", SHIPPED.models)
def test_shipped_architectures_build_and_run_without_memory(name):
    with torch.device("meta"):
        model = build(SHIPPED.models[name].architecture, 1000, SHIPPED.train.context_length)
        ids = torch.zeros(2, SHIPPED.train.context_length, dtype=torch.long)
    assert model(ids).shape == (2, SHIPPED.train.context_length, 1000)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


@pytest.mark.parametrize("name", SHIPPED.models)
def test_the_seed_fixes_the_weights_and_the_first_loss_is_close_to_a_guess(name):
    def fresh(seed):
        torch.manual_seed(seed)
        return build(SHIPPED.models[name].architecture, 1000, 32)

    first, again, other = fresh(1), fresh(1), fresh(2)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.embedding.weight, other.embedding.weight)
    ids = torch.randint(1000, (4, 32))
    loss = torch.nn.functional.cross_entropy(first(ids).flatten(0, 1), ids.flatten())
    assert loss.item() == pytest.approx(torch.tensor(1000.0).log().item(), abs=0.1)


@pytest.mark.parametrize("name", SHIPPED.models)
def test_the_head_reads_the_features(name):
    model = build(SHIPPED.models[name].architecture, 100, 16)
    ids = torch.arange(16)[None]
    assert torch.equal(model.head(model.features(ids)), model(ids))


@pytest.mark.parametrize(("name", "total"), [("seed-2x64", 436_967_344), ("seed-4x8", 514_390_448)])
def test_the_published_models_have_their_exact_size(name, total):
    config = PRESETS[name]
    with torch.device("meta"):
        model = build(config.architecture, config.vocab_size, config.context_length)
        ids = torch.zeros(1, config.context_length, dtype=torch.long)
    assert sum(parameter.numel() for parameter in model.parameters()) == total
    assert model(ids).shape == (1, 2048, 110_000)
