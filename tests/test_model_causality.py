import pytest
import torch
import torch.nn.functional as F
from torch import nn

from stacklm.config.model import Dense, Stack, Stacked
from stacklm.model.build import build
from stacklm.model.causality import CausalityError, check_causality

VOCAB, CONTEXT = 30, 10
ARCHITECTURES = [
    Dense(width=16, heads=2, layers=2, hidden=32),
    Dense(width=16, heads=2, layers=1, hidden=32, activation="swiglu", tied=True),
    Stacked(width=16, heads=2, stacks=(Stack(4, 4, 16), Stack(4, 8, 16)), dropout=0.2),
    Stacked(width=16, heads=4, stacks=(Stack(2, 8, 16),)),
]


class Planted(nn.Module):
    """One attention layer whose weights `mix_TT(self)` gives for a window."""

    def __init__(self, mix_TT):
        super().__init__()
        self.embedding, self.head, self.mix_TT = nn.Embedding(VOCAB, 8), nn.Linear(8, VOCAB), mix_TT

    def forward(self, ids):
        x = self.embedding(ids)
        return self.head(x + self.mix_TT(self, ids.shape[1]).softmax(-1) @ x)


def masked(allowed_TT):
    return torch.zeros(allowed_TT.shape).masked_fill(~allowed_TT, -1e30)


def lower(t):
    return torch.ones(t, t, dtype=torch.bool).tril()


FAULTS = {
    "upper-triangular mask": lambda model, t: masked(lower(t).T),
    "mask one position too wide": lambda model, t: masked(torch.ones(t, t, dtype=torch.bool).tril(1)),
    "mean over time": lambda model, t: torch.zeros(t, t),
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_shipped_architectures_are_causal(architecture):
    check_causality(build(architecture, VOCAB, CONTEXT), VOCAB, CONTEXT)


def test_a_correct_mask_passes():
    check_causality(Planted(lambda model, t: masked(lower(t))), VOCAB, CONTEXT)


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_leaks_are_caught(fault):
    with pytest.raises(CausalityError, match=r"in training mode the logits at positions \[0, 1, .*of 10 change with tokens after"):
        check_causality(Planted(FAULTS[fault]), VOCAB, CONTEXT)


@pytest.mark.parametrize(("leaky", "mode"), [(True, "training"), (False, "evaluation")])
def test_a_mask_missing_in_one_mode_is_caught(leaky, mode):
    def mix(model, t):
        return torch.zeros(t, t) if model.training is leaky else masked(lower(t))

    with pytest.raises(CausalityError, match=f"in {mode} mode"):
        check_causality(Planted(mix), VOCAB, CONTEXT)


def test_a_leak_at_one_position_is_named():
    def mix(model, t):
        allowed = lower(t)
        allowed[4, 7] = True
        return masked(allowed)

    with pytest.raises(CausalityError, match=r"positions \[4\] of 10 change"):
        check_causality(Planted(mix), VOCAB, CONTEXT)


def test_a_normalisation_over_time_is_caught():
    class Normalised(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = build(ARCHITECTURES[0], VOCAB, CONTEXT)

        def forward(self, ids):
            return F.layer_norm(self.model(ids).transpose(1, 2), ids.shape[1:]).transpose(1, 2)

    with pytest.raises(CausalityError, match="change with tokens after"):
        check_causality(Normalised(), VOCAB, CONTEXT)


def test_positions_that_ignore_the_past_are_named():
    with pytest.raises(CausalityError, match=r"positions \[1, 2, 3, 4, 5, 6, 7, 8, 9\] of 10 ignore all tokens before"):
        check_causality(Planted(lambda model, t: masked(torch.eye(t, dtype=torch.bool))), VOCAB, CONTEXT)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_model_and_the_random_state_are_left_as_they_were(architecture):
    model = build(architecture, VOCAB, CONTEXT).eval()
    model.head.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random_state = torch.get_rng_state()
    check_causality(model, VOCAB, CONTEXT)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert model.head.training and not model.training and not model.embedding.training
    assert [m.p for m in model.modules() if isinstance(m, nn.Dropout)] == [getattr(architecture, "dropout", 0)] * len(
        getattr(architecture, "stacks", ())
    )


def test_too_short_a_context_is_refused():
    with pytest.raises(ValueError, match="at least 2 positions"):
        check_causality(build(ARCHITECTURES[0], VOCAB, 1), VOCAB, 1)
