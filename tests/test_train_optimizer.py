from __future__ import annotations

import pytest
import torch
from train_files import MODELS, VOCAB

from stacklm.config.model import Optimizer
from stacklm.model.build import build
from stacklm.model.roles import roles
from stacklm.train.optimizer import build_optimizer, set_lr


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_is_in_one_group_and_only_matrices_decay(name: str) -> None:
    model = build(MODELS[name].architecture, VOCAB, 8)
    optimizer = build_optimizer(model, Optimizer(weight_decay=0.3))
    grouped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == set(model.parameters())
    assert {group["role"]: group["weight_decay"] for group in optimizer.param_groups} == {
        role: 0.3 if role == "matrix" else 0.0 for role in roles(model).values()
    }


@pytest.mark.parametrize("name", MODELS)
def test_without_gradient_matrices_shrink_and_nothing_else_moves(name: str) -> None:
    model = build(MODELS[name].architecture, VOCAB, 8)
    optimizer = build_optimizer(model, Optimizer(peak_lr=0.5, weight_decay=0.2))
    before = {parameter_name: parameter.detach().clone() for parameter_name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    role_of = roles(model)
    for parameter_name, parameter in model.named_parameters():
        kept = 0.9 if role_of[parameter_name] == "matrix" else 1.0
        torch.testing.assert_close(parameter.detach(), kept * before[parameter_name])


def test_set_lr_is_a_share_of_each_groups_peak() -> None:
    optimizer = build_optimizer(build(MODELS["dense"].architecture, VOCAB, 8), Optimizer(peak_lr=0.4))
    optimizer.param_groups[0]["peak_lr"] = 0.8
    for factor in (0.5, 0.25):  # twice: the peak is not lost
        set_lr(optimizer, factor)
        assert [group["lr"] for group in optimizer.param_groups[:2]] == [0.8 * factor, 0.4 * factor]
