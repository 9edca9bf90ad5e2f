import pytest
import torch

from stacklm.model.build import build
from stacklm.model.presets import PRESETS


@pytest.mark.parametrize(("name", "total"), [("seed-2x64", 436_967_344), ("seed-4x8", 514_390_448)])
def test_the_published_models_have_their_exact_size(name, total):
    config = PRESETS[name]
    with torch.device("meta"):
        model = build(config.architecture, config.vocab_size, config.context)
        ids = torch.zeros(1, config.context, dtype=torch.long)
    assert sum(parameter.numel() for parameter in model.parameters()) == total
    assert model(ids).shape == (1, 2048, 110_000)
