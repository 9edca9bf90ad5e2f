"""The models of experiments/ideas.py and experiments/combined.py: this package's models with changes that initially do nothing."""

from __future__ import annotations

import importlib.util
from types import ModuleType

import pytest
import torch

from stacklm.config.model import Dense, FactoredAttention, Stack, Stacked
from stacklm.model.build import build
from stacklm.model.layers import LanguageModel
from support import ROOT

VOCAB, CONTEXT, HIDDEN = 64, 16, 24


def module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / f"experiments/{name}.py")
    assert spec and spec.loader
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


IDEAS, COMBINED = module("ideas"), module("combined")
NAMES = [name for name, found in vars(IDEAS).items() if isinstance(found, type) and issubclass(found, IDEAS.Best)]


def stacked(skip_connections: str) -> Stacked:
    return Stacked(
        96,
        4,
        (Stack(4, 24, HIDDEN),) * 2,
        attention=FactoredAttention(rope=True, qk_norm=True),
        ffn="swiglu",
        residual=True,
        conv_size=4,
        skip_connections=skip_connections,
    )


def starts_as_nothing_and_learns(form: LanguageModel, changed: LanguageModel) -> None:
    """Equal logits with the weights of the form, and gradients for all that is new."""
    changed.load_state_dict(form.state_dict(), strict=False)
    ids_BT = torch.randint(VOCAB, (2, CONTEXT))
    torch.testing.assert_close(changed(ids_BT), form(ids_BT), rtol=1e-5, atol=1e-5)
    optimizer = torch.optim.SGD(changed.parameters(), lr=1)
    for _ in range(3):  # maps that start at zero hold back the gradients of what is before them
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(changed(ids_BT).flatten(0, 1), ids_BT.roll(-1, 1).flatten()).backward()
        optimizer.step()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in changed.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_an_idea_starts_as_the_best_form_of_this_package_and_all_of_it_learns(name):
    assert len(NAMES) == 9
    torch.manual_seed(0)
    form = build(stacked("none"), VOCAB, CONTEXT)
    starts_as_nothing_and_learns(form, getattr(IDEAS, name)(VOCAB, CONTEXT, HIDDEN))


@pytest.mark.parametrize(("convolutions", "gate"), [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("kind", ["Combined", "CombinedDense"])
def test_what_is_combined_starts_as_the_form_with_dynamic_skips_and_all_of_it_learns(kind, convolutions, gate):
    torch.manual_seed(0)
    dense = Dense(96, 4, 5, HIDDEN, ffn="swiglu", conv_size=4, skip_connections="dynamic")
    form = build(stacked("dynamic") if kind == "Combined" else dense, VOCAB, CONTEXT)
    starts_as_nothing_and_learns(form, getattr(COMBINED, kind)(VOCAB, CONTEXT, HIDDEN, convolutions, gate))
