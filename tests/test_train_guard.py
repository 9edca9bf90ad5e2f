from __future__ import annotations

import math

import pytest
import torch

from stacklm.train.guard import Guard, Spikes

OPTIMIZERS = {
    "fused": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, fused=True),
    "plain": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
}
GOOD, BAD, INFINITE = 1.0, math.nan, math.inf


def stepped(kind: str, policy: str, clip_norm: float | None, figures: list[tuple[float, float]]) -> list[bool]:
    """Whether each step of those losses and gradients changed the weights, and with them the moments."""
    model = torch.nn.Linear(3, 1, bias=False)
    optimizer = OPTIMIZERS[kind](model.parameters())
    guard = Guard(optimizer, model, clip_norm, policy)
    changed = []
    for loss, gradient in figures:
        before = model.weight.detach().clone(), str(optimizer.state[model.weight])
        model.weight.grad = torch.full((1, 3), gradient)
        norm = guard.step(torch.tensor(loss))
        assert norm.item() == pytest.approx(gradient * 3**0.5, nan_ok=True)
        assert model.weight.isfinite().all()
        changed.append(not torch.equal(model.weight.detach(), before[0]))
        assert changed[-1] == (str(optimizer.state[model.weight]) != before[1])
    return changed


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("clip_norm", [None, 0.1])
@pytest.mark.parametrize(("loss", "gradient"), [(BAD, GOOD), (GOOD, BAD), (GOOD, INFINITE), (BAD, BAD)])
def test_a_step_that_is_not_finite_is_withheld_with_its_moments(
    kind: str, clip_norm: float | None, loss: float, gradient: float
) -> None:
    figures = [(GOOD, GOOD), (loss, gradient), (GOOD, GOOD)]
    assert stepped(kind, "skip", clip_norm, figures) == [True, False, True]
    assert stepped(kind, "stop", clip_norm, figures) == [True, False, False]


def test_a_spike_is_told_from_noise() -> None:
    spikes = Spikes()
    noise = [3 + 0.05 * math.sin(7 * i) for i in range(60)]
    assert not any(spikes.note(loss) for loss in noise)
    said = spikes.note(4.0)
    assert "jumped to 4.000" in said
    assert "over the last 50 steps it was 3.00" in said
    assert spikes.note(3.0) is None


def test_the_first_steps_are_no_spikes() -> None:
    spikes = Spikes()
    assert not any(spikes.note(loss) for loss in (9.0, 5.0, 11.0, 4.0))
