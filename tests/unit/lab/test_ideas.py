"""The models of experiments/ideas.py: the best form, and one change to it each, that starts as nothing."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from stacklm.config.model import FactoredAttention, Stack, Stacked
from stacklm.model.stacked import StackedDecoder
from support import ROOT

SPEC = importlib.util.spec_from_file_location("ideas", ROOT / "experiments/ideas.py")
assert SPEC and SPEC.loader
ideas = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(ideas)
NAMES = [name for name, found in vars(ideas).items() if isinstance(found, type) and issubclass(found, ideas.Best)]
VOCAB, CONTEXT, HIDDEN = 64, 16, 24


@pytest.mark.parametrize("name", NAMES)
def test_an_idea_starts_as_the_best_form_of_this_package_and_all_of_it_learns(name):
    torch.manual_seed(0)
    attention = FactoredAttention(rope=True, qk_norm=True)
    config = Stacked(96, 4, (Stack(4, 24, HIDDEN),) * 2, attention=attention, ffn="swiglu", residual=True, conv_size=4)
    best, idea = StackedDecoder(config, VOCAB, CONTEXT), getattr(ideas, name)(VOCAB, CONTEXT, HIDDEN)
    idea.load_state_dict(best.state_dict(), strict=False)
    ids_BT = torch.randint(VOCAB, (2, CONTEXT))
    torch.testing.assert_close(idea(ids_BT), best(ids_BT), rtol=1e-5, atol=1e-5)
    optimizer = torch.optim.SGD(idea.parameters(), lr=1)
    for _ in range(3):  # maps that start at zero hold back the gradients of what is before them
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(idea(ids_BT).flatten(0, 1), ids_BT.roll(-1, 1).flatten()).backward()
        optimizer.step()
    assert len(NAMES) == 9 and all(parameter.grad is not None and parameter.grad.any() for parameter in idea.parameters())
