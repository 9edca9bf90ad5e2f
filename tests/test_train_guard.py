from __future__ import annotations

import math

import pytest
import torch

from stacklm.train.guard import Guard, Spikes

OPTIMIZERS = {
    "fused": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, fused=True),
    "plain": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
}
GOOD, BAD = torch.tensor(1.0), torch.tensor(math.nan)
INFINITE = torch.tensor(math.inf)


def stepped(kind: str, policy: str, figures: list[tuple[torch.Tensor, torch.Tensor]]) -> list[bool]:
    """Whether each step of those losses and norms changed the weights; moments that change alone would show at the next."""
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = OPTIMIZERS[kind]([weight])
    guard = Guard(optimizer, policy)
    changed = []
    for loss, norm in figures:
        before = weight.detach().clone(), str(optimizer.state[weight])
        weight.grad = torch.full((3,), norm.item())
        guard.step(loss, norm)
        assert weight.isfinite().all()
        changed.append(not torch.equal(weight.detach(), before[0]))
        assert changed[-1] == (str(optimizer.state[weight]) != before[1])
    return changed


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize(("loss", "norm"), [(BAD, GOOD), (GOOD, BAD), (GOOD, INFINITE), (BAD, BAD)])
def test_a_step_that_is_not_finite_is_withheld_with_its_moments(kind: str, loss: torch.Tensor, norm: torch.Tensor) -> None:
    figures = [(GOOD, GOOD), (loss, norm), (GOOD, GOOD)]
    assert stepped(kind, "skip", figures) == [True, False, True]
    assert stepped(kind, "stop", figures) == [True, False, False]


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
