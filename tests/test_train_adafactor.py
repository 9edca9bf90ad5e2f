from __future__ import annotations

import pytest
import torch

from stacklm.train.adafactor import Adafactor


@pytest.mark.parametrize(
    ("role", "shape"), [("matrix", (12, 20)), ("matrix", (3, 8, 5)), ("embedding", (9, 4)), ("vector", (7,)), ("vector", (3, 7))]
)
def test_the_update_is_torchs_of_every_layer_by_itself(role: str, shape: tuple[int, ...]) -> None:
    """Against `torch.optim.Adafactor` after four steps. Layers of different scales: each has its own size and its own clipping."""
    torch.manual_seed(0)
    dims = 1 if role == "vector" else 2
    scales = torch.logspace(-2, 1, steps=shape[0]).view(-1, *[1] * (len(shape) - 1)) if len(shape) > dims else 1
    packed = (scales * torch.randn(shape, dtype=torch.float64)).requires_grad_()
    slices = [layer.clone().requires_grad_() for layer in packed.detach().reshape(-1, *shape[-dims:])]
    ours = Adafactor([{"role": role, "params": [packed], "lr": 0.02, "weight_decay": 0.1}], beta2_decay=-0.7, eps=1e-3)
    theirs = torch.optim.Adafactor(slices, lr=0.02, weight_decay=0.1, beta2_decay=-0.7)
    for step in range(1, 5):
        packed.grad = scales * step * torch.randn(shape, dtype=torch.float64)
        for layer, gradient in zip(slices, packed.grad.reshape(-1, *shape[-dims:]), strict=True):
            layer.grad = gradient.clone()
        ours.step()
        theirs.step()
    torch.testing.assert_close(packed.detach().reshape(-1, *shape[-dims:]), torch.stack(slices).detach(), rtol=1e-9, atol=1e-12)


def test_the_state_of_a_matrix_is_a_row_and_a_column() -> None:
    weight = torch.ones(3, 50, 40, requires_grad=True)
    weight.grad = torch.ones_like(weight)
    optimizer = Adafactor([{"role": "matrix", "params": [weight], "lr": 0.01, "weight_decay": 0.0}], beta2_decay=-0.8, eps=1e-3)
    optimizer.step()
    assert {name: tuple(tensor.shape) for name, tensor in optimizer.state[weight].items()} == {
        "step": (),
        "rows": (3, 50, 1),
        "columns": (3, 1, 40),
    }
    assert torch.equal(weight.grad, torch.ones_like(weight))
