"""What holds for every kind of optimizer, on dense weights and on packed ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from train_files import CYCLE, MODELS, VOCAB

from stacklm.config.model import Stack, Stacked
from stacklm.config.optimizer import Adafactor, AdamW, Muon, Optimizer, Rest
from stacklm.model.build import build
from stacklm.model.reference import ReferenceDecoder, unpack
from stacklm.model.roles import roles
from stacklm.plan.memory import Memory, Timeline
from stacklm.train.checkpoint import Checkpoints, Progress
from stacklm.train.loss import Objective
from stacklm.train.optimizer import InBackward, NonFiniteError, build_optimizer, set_lr

KINDS: dict[str, Optimizer] = {
    "adamw": AdamW(peak_lr=1e-2),
    "muon": Muon(peak_lr=1e-2, rest=Rest(peak_lr=1e-2)),
    "adafactor": Adafactor(peak_lr=5e-2),
}
CONTEXT = 16

every_kind = pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS)
every_model = pytest.mark.parametrize("name", MODELS)


def batches(count: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Inputs and targets [4, 16] of the cycle, each batch from other places."""
    starts = np.random.default_rng(0).integers(len(CYCLE), size=(count, 4, 1))
    windows = torch.from_numpy(CYCLE[(starts + np.arange(CONTEXT + 1)) % len(CYCLE)].astype(np.int64))
    return ((window[:, :-1], window[:, 1:]) for window in windows)


class Training:
    """A fresh model with its optimizer; the stacked one has dropout."""

    def __init__(self, name: str, settings: Optimizer) -> None:
        torch.manual_seed(0)
        self.model = build(MODELS[name].architecture, VOCAB, CONTEXT)
        self.optimizer = build_optimizer(self.model, settings)

    def backward(self, inputs_BT: torch.Tensor, targets_BT: torch.Tensor) -> float:
        loss = Objective(self.model)(inputs_BT, targets_BT) / targets_BT.numel()
        loss.backward()
        return loss.item()

    def step(self, inputs_BT: torch.Tensor, targets_BT: torch.Tensor) -> float:
        self.model.zero_grad()
        loss = self.backward(inputs_BT, targets_BT)
        self.optimizer.step()
        return loss

    def tensors(self) -> dict[str, torch.Tensor]:
        """Copies of all weights and of the optimizer's state."""
        found = {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}
        for name, parameter in self.model.named_parameters():
            found |= {f"{name}/{key}": value.clone() for key, value in self.optimizer.state[parameter].items()}
        return found


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """To the bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@every_kind
@every_model
def test_every_parameter_is_in_one_group_and_only_matrices_decay(name: str, settings: Optimizer) -> None:
    training = Training(name, replace(settings, weight_decay=0.3))
    groups = training.optimizer.param_groups
    grouped = [parameter for group in groups for parameter in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == set(training.model.parameters())
    assert {group["role"]: group["weight_decay"] for group in groups} == {
        role: 0.3 if role == "matrix" else 0.0 for role in roles(training.model).values()
    }
    assert groups[0]["role"] == "matrix" and groups[0]["peak_lr"] == settings.peak_lr


@every_kind
@every_model
def test_without_gradient_matrices_shrink_and_nothing_else_moves(name: str, settings: Optimizer) -> None:
    training = Training(name, replace(settings, peak_lr=0.5, weight_decay=0.2))
    before = training.tensors()
    for parameter in training.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    training.optimizer.step()
    for parameter_name, role in roles(training.model).items():
        kept = 0.9 if role == "matrix" else 1.0
        torch.testing.assert_close(training.tensors()[parameter_name], kept * before[parameter_name])


@every_kind
def test_set_lr_is_a_share_of_each_groups_peak(settings: Optimizer) -> None:
    optimizer = Training("dense", replace(settings, peak_lr=0.4)).optimizer
    optimizer.param_groups[0]["peak_lr"] = 0.8
    for factor in (0.5, 0.25):  # twice: the peak is not lost
        set_lr(optimizer, factor)
        assert optimizer.param_groups[0]["lr"] == 0.8 * factor
        assert all(group["lr"] == group["peak_lr"] * factor for group in optimizer.param_groups)


@every_kind
@every_model
def test_it_learns(name: str, settings: Optimizer) -> None:
    training = Training(name, settings)
    losses = [training.step(*batch) for batch in batches(30)]
    assert np.mean(losses[-5:]) < 0.4 * losses[0]


@every_kind
@every_model
def test_what_is_saved_and_restored_goes_on_to_the_bit(tmp_path: Path, name: str, settings: Optimizer) -> None:
    whole, first, second = (Training(name, settings) for _ in range(3))
    data = list(batches(5))
    torch.manual_seed(1)
    for batch in data:
        whole.step(*batch)
    torch.manual_seed(1)
    for batch in data[:3]:
        first.step(*batch)
    Checkpoints(tmp_path, {}, keep=1).save(first.model, first.optimizer, Progress(3, 0, 0.0))
    torch.manual_seed(2)
    Checkpoints(tmp_path, {}, keep=1).restore(second.model, second.optimizer)
    for batch in data[3:]:
        second.step(*batch)
    assert same(whole.tensors(), second.tensors())


@every_kind
@every_model
def test_a_step_in_backward_is_an_ordinary_one_to_the_bit(name: str, settings: Optimizer) -> None:
    after, within = Training(name, settings), Training(name, replace(settings, in_backward=True))
    in_backward = InBackward(within.optimizer, within.model)
    for i, batch in enumerate(batches(3)):
        torch.manual_seed(i)
        after.step(*batch)
        torch.manual_seed(i)
        within.backward(*batch)
        assert all(parameter.grad is None for parameter in within.model.parameters())
        norm = nn.utils.get_total_norm([parameter.grad for parameter in after.model.parameters()])
        assert in_backward.step(torch.zeros(())).item() == pytest.approx(norm.item(), rel=1e-5)
    assert same(after.tensors(), within.tensors())
    assert in_backward.step(torch.zeros(())).item() == 0


@every_kind
def test_in_backward_nothing_is_updated_with_a_gradient_that_is_not_finite(settings: Optimizer) -> None:
    training = Training("dense", settings)
    InBackward(training.optimizer, training.model)
    before = training.tensors()
    name, spoilt = next((name, p) for name, p in training.model.named_parameters() if name.endswith("query.weight"))
    spoilt.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor([3]), torch.nan))
    with pytest.raises(NonFiniteError, match=f"gradient of {name} has the norm nan"):
        training.backward(*next(batches(1)))
    assert torch.equal(spoilt, before[name])
    assert all(parameter.isfinite().all() for parameter in training.model.parameters())


@every_kind
def test_in_backward_there_is_one_gradient_at_a_time(settings: Optimizer) -> None:
    """As the plan's tracer sees it, with more weights than activations."""
    ids_BT = torch.zeros(1, 2, dtype=torch.long)

    def traced(in_backward: bool) -> tuple[Memory, Training]:
        with FakeTensorMode(allow_non_fake_inputs=True), Timeline(VOCAB) as timeline:
            training = Training("dense", settings)
            timeline.follow(training.model)
            if in_backward:
                InBackward(training.optimizer, training.model)
                training.backward(ids_BT, ids_BT)
            else:
                training.step(ids_BT, ids_BT)
        return timeline.memory(), training

    (after, training), (within, _) = traced(in_backward=False), traced(in_backward=True)
    sizes = [4 * parameter.numel() for parameter in training.model.parameters()]
    assert after.parts["gradients"] == sum(sizes)
    assert within.parts["gradients"] <= max(sizes)
    assert within.tensors < after.tensors


@every_kind
def test_packed_and_separate_layers_get_the_same_weights(settings: Optimizer) -> None:
    """In float64, where rounding hides no difference. A key's bias changes no output, so its gradient is noise."""
    config = Stacked(16, 2, (Stack(4, 4, 16), Stack(4, 8, 32)))
    torch.manual_seed(0)
    packed, separate = build(config, VOCAB, CONTEXT).double(), ReferenceDecoder(config, VOCAB, CONTEXT).double()
    separate.load_state_dict(unpack(packed.state_dict()))
    data = list(batches(3))
    for model in (packed, separate):
        optimizer = build_optimizer(model, settings)
        for batch in data:
            model.zero_grad()
            (Objective(model)(*batch) / batch[0].numel()).backward()
            optimizer.step()
    wanted = {name: weight for name, weight in separate.state_dict().items() if not name.endswith("key.bias")}
    found = unpack(packed.state_dict())
    torch.testing.assert_close({name: found[name] for name in wanted}, wanted, rtol=1e-8, atol=1e-10)
