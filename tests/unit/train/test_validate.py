from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from stacklm.data.batches import evaluation_batches
from stacklm.data.shards import Shards
from stacklm.model.build import build
from stacklm.train.validate import score, validate
from support.rounding import rounding
from support.train_files import CYCLE, MODELS, VOCAB, write_cycle

pytestmark = pytest.mark.numerical

ERROR = rounding(torch.float32, VOCAB)
"""Of a token's loss, a sum over the vocabulary; sums over tokens are in float64."""


@pytest.fixture
def data(tmp_path: Path) -> Shards:
    return Shards.open(write_cycle(tmp_path / "shards"))


def test_a_uniform_model_has_loss_ln_v_special_tokens_included_and_bits_without_them(data: Shards) -> None:
    """150 tokens of the cycle of 16: 9 end tokens; a token's text is as long as its id."""
    model = build(MODELS["stacked"].architecture, VOCAB, 16)
    for parameter in model.head.parameters():
        nn.init.zeros_(parameter)
    result = validate(model, data.split("valid"), data.token_bytes, context=16, batch_size=4, tokens=10**9)
    text_bytes = 9 * int(CYCLE.sum()) + int(CYCLE[:6].sum())
    assert result.bytes == text_bytes
    assert result.tokens == 150
    assert result.nats == pytest.approx(150 * math.log(16), rel=ERROR)
    assert result.loss == pytest.approx(math.log(16), rel=ERROR)
    assert result.text_nats == pytest.approx(141 * math.log(16), rel=ERROR)
    assert result.bits_per_byte == pytest.approx(141 * 4 / text_bytes, rel=ERROR)


def test_only_the_first_tokens_are_scored(data: Shards) -> None:
    """Token i is given probability 2**-i, so the sum tells which tokens were scored."""

    class Known(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(1, VOCAB, bias=False)
            self.head.weight.data = -math.log(2) * torch.arange(VOCAB).float()[:, None]

        def features(self, ids_BT: torch.Tensor) -> torch.Tensor:
            return torch.ones(*ids_BT.shape, 1)

    normaliser = math.log(sum(2.0**-i for i in range(VOCAB)))
    for tokens in (1, 16, 37, 64, 150):
        for batch_size in (1, 3, 4):
            result = validate(Known(), data.split("valid"), data.token_bytes, context=8, batch_size=batch_size, tokens=tokens)
            ids = [int(CYCLE[i % 16]) for i in range(tokens)]
            assert result.tokens == tokens
            assert result.nats == pytest.approx(sum(ids) * math.log(2) + tokens * normaliser, rel=ERROR)


@pytest.mark.parametrize("name", MODELS)
def test_the_batch_size_is_immaterial(data: Shards, name: str) -> None:
    torch.manual_seed(3)
    model = build(MODELS[name].architecture, VOCAB, 16)
    losses = [
        score(model, evaluation_batches(data.split("valid"), 16, batch_size), data.token_bytes).loss for batch_size in (1, 4, 7, 64)
    ]
    assert losses == pytest.approx([losses[0]] * 4, rel=ERROR)


def test_dropout_is_off_and_the_mode_comes_back(data: Shards) -> None:
    model = build(MODELS["stacked"].architecture, VOCAB, 16).train()
    batches = list(evaluation_batches(data.split("valid"), 16, 4))
    assert score(model, batches, data.token_bytes) == score(model, batches, data.token_bytes)
    assert model.training
    model.eval()
    score(model, batches, data.token_bytes)
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())
