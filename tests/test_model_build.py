from pathlib import Path

import pytest
import torch

from stacklm.config.params import load
from stacklm.model.build import build

SHIPPED = load(Path(__file__).parent.parent / "params.yaml")


@pytest.mark.parametrize("name", SHIPPED.models)
def test_shipped_architectures_build_and_run_without_memory(name):
    with torch.device("meta"):
        model = build(SHIPPED.models[name].architecture, 1000, SHIPPED.train.context)
        ids = torch.zeros(2, SHIPPED.train.context, dtype=torch.long)
    assert model(ids).shape == (2, SHIPPED.train.context, 1000)
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
