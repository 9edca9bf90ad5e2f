from __future__ import annotations

import math

import torch
from torch import nn

from stacklm.train.loss import token_losses


def test_each_token_has_the_loss_of_its_own_logits() -> None:
    class Table(nn.Module):
        def forward(self, ids_BT: torch.Tensor) -> torch.Tensor:
            return torch.tensor([[0.0, 0.0, 0.0], [math.log(2), math.log(5), math.log(3)]])[ids_BT]

    losses_BT = token_losses(Table(), torch.tensor([[0, 1], [1, 1]]), torch.tensor([[2, 0], [1, 2]]))
    torch.testing.assert_close(losses_BT, -torch.tensor([[1 / 3, 0.2], [0.5, 0.3]]).log())
