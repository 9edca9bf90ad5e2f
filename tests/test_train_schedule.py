from __future__ import annotations

import pytest

from stacklm.config.train import Train
from stacklm.train.schedule import lr_factor


def config(**changes) -> Train:
    return Train(**{"steps": 100, "context": 8, "batch_size": 2, "micro_batch": 2, "warmup_steps": 20, "final_lr": 0.1, **changes})


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        ("cosine", {1: 0.05, 10: 0.5, 20: 1.0, 40: 0.868198, 60: 0.55, 100: 0.1}),
        ("linear", {1: 0.05, 10: 0.5, 20: 1.0, 40: 0.775, 60: 0.55, 100: 0.1}),
        ("wsd", {1: 0.05, 10: 0.5, 20: 1.0, 60: 1.0, 80: 1.0, 90: 0.55, 100: 0.1}),
    ],
)
def test_values(schedule: str, values: dict[int, float]) -> None:
    """cosine at 40, a quarter of the way: 0.1 + 0.9 * (1 + cos(pi / 4)) / 2."""
    assert {step: lr_factor(step, config(schedule=schedule)) for step in values} == pytest.approx(values, rel=1e-6)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_it_rises_then_never_rises_again(schedule: str) -> None:
    factors = [lr_factor(step, config(schedule=schedule)) for step in range(1, 101)]
    assert factors[:20] == sorted(factors[:20])
    assert factors[19:] == sorted(factors[19:], reverse=True)


def test_extremes() -> None:
    assert lr_factor(1, config(warmup_steps=0, schedule="linear", final_lr=1.0)) == 1.0
    assert lr_factor(100, config(schedule="wsd", decay=0.0)) == 1.0
    assert lr_factor(60, config(schedule="wsd", decay=1.0)) == pytest.approx(0.55)  # the warm-up comes first
    assert lr_factor(100, config(final_lr=0.0)) == pytest.approx(0.0)
