"""Schedules, all optimizers on dense and packed weights, and when their steps are taken."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stacklm.config.model import Stack, Stacked
from stacklm.config.optimizer import Adafactor as AdafactorConfig
from stacklm.config.optimizer import AdamW, Optimizer, Rest
from stacklm.config.optimizer import Muon as MuonConfig
from stacklm.model.build import build
from stacklm.model.count import roles
from stacklm.plan.memory import Memory, tracing
from stacklm.train import NonFiniteError
from stacklm.train.checkpoint import Checkpoints, Progress
from stacklm.train.loss import Objective
from stacklm.train.optimizer import (
    COEFFICIENTS,
    Adafactor,
    AfterBackward,
    InBackward,
    Muon,
    build_optimizer,
    lr_factor,
    orthogonal,
    set_lr,
)
from support.reference import ReferenceDecoder, unpack
from support.rounding import assert_same, rounding
from support.train_files import CYCLE, MODELS, TRAIN, VOCAB

pytestmark = pytest.mark.numerical

KINDS: dict[str, Optimizer] = {
    "adamw": AdamW(peak_lr=1e-2),
    "muon": MuonConfig(peak_lr=1e-2, adamw=Rest(peak_lr=1e-2)),
    "adafactor": AdafactorConfig(peak_lr=5e-2),
}
ROWS, CONTEXT = 4, 16
SCHEDULE = replace(TRAIN, max_steps=100, warmup_steps=20)

every_kind = pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS)
every_model = pytest.mark.parametrize("name", MODELS)


@pytest.mark.parametrize(
    ("changes", "values"),
    [
        ({}, {1: 0.05, 10: 0.5, 20: 1.0, 40: 0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2, 60: 0.55, 100: 0.1}),
        ({"lr_schedule": "linear"}, {1: 0.05, 10: 0.5, 20: 1.0, 40: 0.775, 60: 0.55, 100: 0.1}),
        ({"lr_schedule": "wsd"}, {1: 0.05, 10: 0.5, 20: 1.0, 60: 1.0, 80: 1.0, 90: 0.55, 100: 0.1}),
        ({"lr_schedule": "linear", "warmup_steps": 0, "final_lr_fraction": 1.0}, {1: 1.0}),
        ({"lr_schedule": "wsd", "decay_fraction": 0.0}, {100: 1.0}),
        ({"lr_schedule": "wsd", "decay_fraction": 1.0}, {60: 0.55}),  # the warm-up comes first
        ({"final_lr_fraction": 0.0}, {100: 0.0}),
    ],
    ids=str,
)
def test_the_learning_rate_rises_then_falls_along_its_curve(changes: dict, values: dict[int, float]) -> None:
    config = replace(SCHEDULE, **changes)
    error = rounding(torch.float64, 4)
    assert {step: lr_factor(step, config) for step in values} == pytest.approx(values, rel=error, abs=error)
    factors = [lr_factor(step, config) for step in range(1, 101)]
    warmup = max(1, config.warmup_steps)
    assert factors[:warmup] == sorted(factors[:warmup])
    assert factors[warmup - 1 :] == sorted(factors[warmup - 1 :], reverse=True)


def batches(count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and targets [4, 16] of the cycle, each batch from other places."""
    starts = np.random.default_rng(0).integers(len(CYCLE), size=(count, ROWS, 1))
    sequences = torch.from_numpy(CYCLE[(starts + np.arange(CONTEXT + 1)) % len(CYCLE)].astype(np.int64))
    return ((sequence[:, :-1], sequence[:, 1:]) for sequence in sequences)


class Training:
    """A fresh model with its optimizer; the stacked one has dropout."""

    def __init__(self, name: str, settings: Optimizer) -> None:
        torch.manual_seed(0)
        self.model = build(MODELS[name].architecture, VOCAB, CONTEXT)
        self.optimizer = build_optimizer(self.model, settings)

    def backward(self, inputs_BT: Tensor, targets_BT: Tensor) -> float:
        loss = Objective(self.model)(inputs_BT, targets_BT) / targets_BT.numel()
        loss.backward()
        return loss.item()

    def step(self, inputs_BT: Tensor, targets_BT: Tensor) -> float:
        self.model.zero_grad()
        loss = self.backward(inputs_BT, targets_BT)
        self.optimizer.step()
        return loss

    def tensors(self) -> dict[str, Tensor]:
        """Copies of all weights and of the optimizer's state."""
        found = {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}
        for name, parameter in self.model.named_parameters():
            found |= {f"{name}/{key}": value.clone() for key, value in self.optimizer.state[parameter].items()}
        return found


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """To the bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@every_kind
@every_model
def test_every_parameter_is_in_one_group_and_only_matrices_decay(name: str, settings: Optimizer) -> None:
    """Without a gradient matrices shrink by learning rate times decay, and nothing else moves."""
    training = Training(name, replace(settings, peak_lr=0.5, weight_decay=0.2))
    groups, role_of = training.optimizer.param_groups, roles(training.model)
    grouped = [parameter for group in groups for parameter in group["params"]]
    assert len(grouped) == len(set(grouped)) and set(grouped) == set(training.model.parameters())
    assert {group["role"]: group["weight_decay"] for group in groups} == {
        role: 0.2 if role == "matrix" else 0.0 for role in role_of.values()
    }
    assert groups[0]["role"] == "matrix" and groups[0]["peak_lr"] == 0.5
    before = training.tensors()
    for parameter in training.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    training.optimizer.step()
    after = training.tensors()
    for parameter_name, role in role_of.items():
        kept = 0.9 if role == "matrix" else 1.0
        torch.testing.assert_close(after[parameter_name], kept * before[parameter_name], rtol=rounding(torch.float32, 1), atol=0)


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
    for training, part in ((whole, data), (first, data[:3])):
        torch.manual_seed(1)
        for batch in part:
            training.step(*batch)
    Checkpoints(tmp_path, {}, keep=1).save(first.model, first.optimizer, Progress(3, 0, 0.0))
    torch.manual_seed(2)
    Checkpoints(tmp_path, {}, keep=1).restore(second.model, second.optimizer)
    for batch in data[3:]:
        second.step(*batch)
    assert same(whole.tensors(), second.tensors())


@every_kind
def test_packed_and_separate_layers_get_the_same_weights(settings: Optimizer) -> None:
    """In float64. A key's bias changes no output, so its gradient is noise.

    Every update is divided by the size of its gradient, of which the smallest of n is about 1/n of the typical one.
    """
    config, steps = Stacked(16, 2, (Stack(4, 4, 16), Stack(4, 8, 32))), 3
    torch.manual_seed(0)
    packed, separate = build(config, VOCAB, CONTEXT).double(), ReferenceDecoder(config, VOCAB, CONTEXT).double()
    separate.load_state_dict(unpack(packed.state_dict()))
    for model in (packed, separate):
        optimizer = build_optimizer(model, settings)
        for inputs_BT, targets_BT in batches(steps):
            model.zero_grad()
            (Objective(model)(inputs_BT, targets_BT) / targets_BT.numel()).backward()
            optimizer.step()
    found, parameters = unpack(packed.state_dict()), sum(parameter.numel() for parameter in packed.parameters())
    error = steps * settings.peak_lr * parameters * rounding(torch.float64, ROWS * CONTEXT * VOCAB)
    for name, wanted in separate.state_dict().items():
        if not name.endswith("key.bias"):
            torch.testing.assert_close(found[name], wanted, rtol=0, atol=error)


def assert_slices_follow(
    ours: torch.optim.Optimizer, reference: type, packed: Tensor, dims: int, steps: int, terms: int, settings: dict
):
    """That `ours` updates a packed weight as torch's own optimizer updates each layer by itself; layers differ in scale."""
    slices = [layer.clone().requires_grad_() for layer in packed.detach().reshape(-1, *packed.shape[-dims:])]
    theirs = reference(slices, **settings)
    scales = packed.detach().abs().amax(tuple(range(1, packed.dim())), keepdim=True) if packed.dim() > dims else 1
    for step in range(1, steps + 1):
        packed.grad = scales * step * torch.randn_like(packed)
        for layer, gradient in zip(slices, packed.grad.reshape(-1, *packed.shape[-dims:]), strict=True):
            layer.grad = gradient.clone()
        ours.step()
        theirs.step()
    assert_same(packed.detach().reshape(-1, *packed.shape[-dims:]), torch.stack(slices).detach(), steps * terms)


@pytest.mark.parametrize("lr", [0.02, 0.7])
@pytest.mark.parametrize(
    ("role", "shape"), [("matrix", (12, 20)), ("matrix", (3, 8, 5)), ("embedding", (9, 4)), ("vector", (7,)), ("vector", (3, 7))]
)
def test_adafactor_is_torchs_of_every_layer_by_itself(role: str, shape: tuple[int, ...], lr: float) -> None:
    """The larger learning rate exceeds the cap of 1 / sqrt(step) from step 3 on. Each layer has its own clipping."""
    torch.manual_seed(0)
    dims = 1 if role == "vector" else 2
    scales = torch.logspace(-2, 1, steps=shape[0]).view(-1, *[1] * (len(shape) - 1)) if len(shape) > dims else 1
    packed = (scales * torch.randn(shape, dtype=torch.float64)).requires_grad_()
    ours = Adafactor([{"role": role, "params": [packed], "lr": lr, "weight_decay": 0.1}], beta2_decay=-0.7, eps=1e-3)
    settings = {"lr": lr, "weight_decay": 0.1, "beta2_decay": -0.7}
    assert_slices_follow(ours, torch.optim.Adafactor, packed, dims, 4, packed.numel(), settings)


def test_the_state_of_adafactor_is_a_row_and_a_column() -> None:
    weight = torch.ones(3, 50, 40, requires_grad=True)
    weight.grad = torch.ones_like(weight)
    optimizer = Adafactor([{"role": "matrix", "params": [weight], "lr": 0.01, "weight_decay": 0.0}], beta2_decay=-0.8, eps=1e-3)
    optimizer.step()
    shapes = {name: tuple(tensor.shape) for name, tensor in optimizer.state[weight].items()}
    assert shapes == {"step": (), "rows": (3, 50, 1), "columns": (3, 1, 40)}
    assert torch.equal(weight.grad, torch.ones_like(weight))


def test_adafactor_moves_no_further_for_a_gradient_far_above_those_before() -> None:
    """The cap on updates: without it this step would be 1 / sqrt(weight of the newest moment) times as large."""
    torch.manual_seed(0)
    weight, lr = torch.randn(20, 30, dtype=torch.float64, requires_grad=True), 1e-3
    optimizer = Adafactor([{"role": "matrix", "params": [weight], "lr": lr, "weight_decay": 0.0}], beta2_decay=-0.8, eps=1e-3)
    before = weight.detach().clone()
    for size in [1e-3] * 20 + [1.0]:
        before = weight.detach().clone()
        weight.grad = size * torch.randn_like(weight)
        optimizer.step()
    changed, was = ((x.square().mean().sqrt().item()) for x in (weight.detach() - before, before))
    assert changed == pytest.approx(lr * was, rel=rounding(torch.float64, weight.numel()) / lr)  # of a difference of weights


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (3, 16, 16), (2, 3, 4, 24)])
def test_muon_is_torchs_of_every_matrix_by_itself(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.optim.Muon` knows two dimensions; here without its rounding to bfloat16. Each iteration amplifies what is small."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda tensor: tensor.clone())
    torch.manual_seed(0)
    packed = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    group = {"role": "matrix", "params": [packed], "lr": 0.02, "weight_decay": 0.1}
    ours = Muon([group], momentum=0.9, ns_steps=4, betas=(0.9, 0.95), eps=1e-8)
    settings = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.9, "ns_steps": 4, "adjust_lr_fn": "match_rms_adamw"}
    terms = round(4 * 3 * max(shape) * COEFFICIENTS[0] ** 8)  # an error that is COEFFICIENTS[0] ** 4 times as large
    assert_slices_follow(ours, torch.optim.Muon, packed, 2, 3, terms, settings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(24, 8), (5, 8, 24)])
def test_muon_brings_singular_values_near_one_and_keeps_singular_vectors(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """By 15 products, rounded once each in bfloat16 and 24 times in float32; the first two iterations amplify that."""
    torch.manual_seed(0)
    x = torch.randn(shape)
    found = orthogonal(x.to(dtype), steps=5)
    assert found.dtype == dtype
    left, _, right = torch.linalg.svd(x, full_matrices=False)
    inner = left.mT @ found.float() @ right.mT
    values = inner.diagonal(dim1=-2, dim2=-1)
    assert values.min() > 0.6 and values.max() < 1.3
    roundings = 15 if dtype == torch.bfloat16 else 15 * 24
    error = torch.finfo(dtype).eps * math.sqrt(roundings) * COEFFICIENTS[0] ** 2
    assert (inner - torch.diag_embed(values)).abs().max() < error


def test_muon_leaves_what_is_no_matrix_to_adamw() -> None:
    torch.manual_seed(0)
    ours, theirs = (torch.ones(3, 4, requires_grad=True) for _ in range(2))
    settings = {"betas": (0.8, 0.9), "eps": 1e-6}
    group = {"role": "vector", "params": [ours], "lr": 0.1, "weight_decay": 0.0}
    optimizers = Muon([group], 0.95, 5, **settings), torch.optim.AdamW([theirs], lr=0.1, weight_decay=0.0, fused=True, **settings)
    for _ in range(3):
        ours.grad = theirs.grad = torch.randn(3, 4)
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(ours, theirs)


STEPPED = {
    "fused": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, fused=True),
    "plain": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
}
GOOD, BAD, INFINITE = 1.0, math.nan, math.inf


def stepped(kind: str, policy: str, max_grad_norm: float | None, figures: list[tuple[float, float]]) -> list[bool]:
    """Whether each step of those losses and gradients changed the weights, and with them the moments."""
    model = nn.Linear(3, 1, bias=False)
    optimizer = STEPPED[kind](model.parameters())
    stepper = AfterBackward(optimizer, model, max_grad_norm, policy)
    changed = []
    for loss, gradient in figures:
        before = model.weight.detach().clone(), str(optimizer.state[model.weight])
        model.weight.grad = torch.full((1, 3), gradient)
        norm = stepper.clip_grad_norm()
        stepper.step(torch.tensor(loss), norm)
        assert norm.item() == pytest.approx(gradient * 3**0.5, rel=rounding(torch.float32, 3), nan_ok=True)
        assert model.weight.isfinite().all()
        changed.append(not torch.equal(model.weight.detach(), before[0]))
        assert changed[-1] == (str(optimizer.state[model.weight]) != before[1])
    return changed


@pytest.mark.parametrize("kind", STEPPED)
@pytest.mark.parametrize("max_grad_norm", [None, 0.1])
@pytest.mark.parametrize(("loss", "gradient"), [(BAD, GOOD), (GOOD, BAD), (GOOD, INFINITE), (BAD, BAD)])
def test_a_step_that_is_not_finite_is_withheld_with_its_moments(
    kind: str, max_grad_norm: float | None, loss: float, gradient: float
) -> None:
    figures = [(GOOD, GOOD), (loss, gradient), (GOOD, GOOD)]
    assert stepped(kind, "skip", max_grad_norm, figures) == [True, False, True]
    assert stepped(kind, "stop", max_grad_norm, figures) == [True, False, False]


@every_kind
@every_model
def test_a_step_in_backward_is_an_ordinary_one_to_the_bit(name: str, settings: Optimizer) -> None:
    after, within = Training(name, settings), Training(name, replace(settings, optimizer_in_backward=True))
    in_backward = InBackward(within.optimizer, within.model)
    error = rounding(torch.float32, sum(parameter.numel() for parameter in after.model.parameters()))
    for i, batch in enumerate(batches(3)):
        torch.manual_seed(i)
        after.step(*batch)
        torch.manual_seed(i)
        within.backward(*batch)
        assert all(parameter.grad is None for parameter in within.model.parameters())
        norm = nn.utils.get_total_norm([parameter.grad for parameter in after.model.parameters() if parameter.requires_grad])
        assert in_backward.clip_grad_norm().item() == pytest.approx(norm.item(), rel=error)
    assert same(after.tensors(), within.tensors())
    assert in_backward.clip_grad_norm().item() == 0


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

    def traced(optimizer_in_backward: bool) -> tuple[Memory, Training]:
        with tracing(VOCAB) as timeline:
            training = Training("dense", settings)
            timeline.follow(training.model)
            if optimizer_in_backward:
                InBackward(training.optimizer, training.model)
                training.backward(ids_BT, ids_BT)
            else:
                training.step(ids_BT, ids_BT)
        return timeline.memory(), training

    (after, training), (within, _) = traced(optimizer_in_backward=False), traced(optimizer_in_backward=True)
    sizes = [4 * parameter.numel() for parameter in training.model.parameters()]
    assert after.parts["gradients"] == sum(sizes)
    assert within.parts["gradients"] <= max(sizes)
    assert within.tensors < after.tensors
