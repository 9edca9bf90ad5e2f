from __future__ import annotations

import pytest
import torch
from torch import nn
from train_files import MODELS, VOCAB

from stacklm.config.evaluate import Sample
from stacklm.evaluate.generate import choose, generate
from stacklm.model.build import build


class Counting(nn.Module):
    """Always goes on with the next number, and keeps the inputs it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(VOCAB, VOCAB)
        nn.init.eye_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.seen: list[list[int]] = []

    def features(self, ids_BT: torch.Tensor) -> torch.Tensor:
        self.seen.append(ids_BT[0].tolist())
        return 100.0 * nn.functional.one_hot((ids_BT + 1) % VOCAB, VOCAB)


def test_it_goes_on_from_the_last_token_and_sees_at_most_the_context() -> None:
    model = Counting()
    assert list(generate(model, [7, 3], Sample(tokens=4), context=3)) == [4, 5, 6, 7]
    assert model.seen == [[7, 3], [7, 3, 4], [3, 4, 5], [4, 5, 6]]


@pytest.mark.parametrize("name", MODELS)
def test_the_likeliest_tokens_are_those_of_the_full_forward(name: str) -> None:
    torch.manual_seed(5)
    model = build(MODELS[name].architecture, VOCAB, 16).eval()
    ids = [2, 7]
    for token in generate(model, ids.copy(), Sample(tokens=20, temperature=0.0), context=16):
        assert token == int(model(torch.tensor([ids[-16:]]))[0, -1].argmax())
        ids.append(token)


def test_the_seed_decides() -> None:
    torch.manual_seed(5)
    model = build(MODELS["stacked"].architecture, VOCAB, 16).eval()
    first, again, other = (list(generate(model, [0], Sample(tokens=30, seed=seed), 16)) for seed in (1, 1, 2))
    assert first == again != other


def draws(temperature: float, top_k: int) -> torch.Tensor:
    """How often each of four tokens of probability 0.4, 0.3, 0.2 and 0.1 is drawn in 2,000."""
    generator = torch.Generator().manual_seed(1)
    logits_V = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()
    return torch.bincount(torch.tensor([choose(logits_V, temperature, top_k, generator) for _ in range(2000)]), minlength=4) / 2000


@pytest.mark.parametrize(
    ("temperature", "top_k", "shares"),
    [
        (1.0, 0, [0.1, 0.4, 0.2, 0.3]),
        (1.0, 99, [0.1, 0.4, 0.2, 0.3]),
        (1.0, 2, [0, 4 / 7, 0, 3 / 7]),
        (0.5, 0, [1 / 30, 16 / 30, 4 / 30, 9 / 30]),
        (0.5, 3, [0, 16 / 29, 4 / 29, 9 / 29]),
        (5.0, 1, [0, 1, 0, 0]),
        (0.0, 0, [0, 1, 0, 0]),
    ],
)
def test_temperature_and_top_k(temperature: float, top_k: int, shares: list[float]) -> None:
    assert draws(temperature, top_k).tolist() == pytest.approx(shares, abs=0.03)
    assert [share > 0 for share in draws(temperature, top_k)] == [share > 0 for share in shares]
