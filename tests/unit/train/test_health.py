from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from stacklm.config.model import Dense
from stacklm.config.optimizer import AdamW
from stacklm.model.build import build
from stacklm.model.count import roles
from stacklm.train import health
from stacklm.train.health import Health, sample
from stacklm.train.loss import Objective
from stacklm.train.optimizer import AfterBackward, InBackward, build_optimizer
from support.model_variants import CONTEXT, TINY, VARIANTS, VOCAB
from support.rounding import rounding

DENSE = {f"dense {activation}": Dense(16, 2, 2, 24, ffn=activation) for activation in ("relu2", "swiglu")}
ARCHITECTURES = {**VARIANTS, **DENSE, "dropout": replace(TINY, dropout=0.3)}
PROBE = torch.randint(VOCAB, (2, CONTEXT), generator=torch.Generator().manual_seed(7))


def fresh(name: str) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(3)
    model = build(ARCHITECTURES[name], VOCAB, CONTEXT)
    return model, build_optimizer(model, AdamW(peak_lr=1e-2))


def gradients(model: torch.nn.Module) -> None:
    model.zero_grad()
    (Objective(model)(PROBE, PROBE.roll(-1, dims=1)) / PROBE.numel()).backward()


def measured_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    watched = Health(model, PROBE)
    gradients(model)
    watched.before_step()
    optimizer.step()
    watched.after_step()
    return watched.read()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_role_and_part_of_every_variant_is_seen_whichever_way_it_runs(name: str) -> None:
    model, optimizer = fresh(name)
    figures = measured_step(model, optimizer)
    stacked = name not in DENSE
    parts = [f"stack{i}" for i in range(len(model.stacks))] if stacked else ["block0", "block1"]
    whats = ["activation", "dead_hidden", *(["dead_features", "dead_worst_layer"] if stacked else [])]
    present = set(roles(model).values())
    assert set(figures) >= {f"health/{what}/{part}" for what in whats for part in parts}
    assert set(figures) >= {f"health/{what}/{role}" for what in ("gradient", "update", "relative_update") for role in present}
    assert len(figures) == len(whats) * len(parts) + 3 * len(present)
    model.activation_checkpointing = True
    for key, value in Health(model, PROBE).read().items():
        assert value == figures[key], key  # without gradients the same operations run


@pytest.mark.parametrize("name", ["base", "modern", "dense relu2"])
def test_norms_are_those_of_all_gradients_and_of_what_changed(name: str) -> None:
    model, optimizer = fresh(name)
    before = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    figures = measured_step(model, optimizer)
    for role in set(roles(model).values()):
        names = [key for key, its in roles(model).items() if its == role]
        error = rounding(torch.float32, sum(before[key].numel() for key in names))
        update = math.sqrt(sum((model.get_parameter(key) - before[key]).square().sum().item() for key in names))
        weight = math.sqrt(sum(before[key].square().sum().item() for key in names))
        gradient = math.sqrt(
            sum(model.get_parameter(key).grad.square().sum().item() for key in names if model.get_parameter(key).requires_grad)
        )
        assert update > 0 and gradient > 0
        assert figures[f"health/update/{role}"] == pytest.approx(update, rel=error)
        assert figures[f"health/relative_update/{role}"] == pytest.approx(update / weight, rel=error)
        assert figures[f"health/gradient/{role}"] == pytest.approx(gradient, rel=error)


def test_a_step_within_the_backward_pass_is_seen_but_for_its_gradients() -> None:
    figures = []
    for in_backward in (False, True):
        model, optimizer = fresh("modern")
        watched = Health(model, PROBE)
        stepper = InBackward(optimizer, model) if in_backward else AfterBackward(optimizer, model, None, "stop")
        watched.before_backward()
        gradients(model)
        watched.before_step()
        stepper.step(torch.zeros(()), stepper.clip_grad_norm())
        watched.after_step()
        figures.append(watched.read())
    assert figures[1] == {key: value for key, value in figures[0].items() if "/gradient/" not in key}
    assert figures[1]["health/update/matrix"] > 0


def test_the_scale_is_that_of_what_leaves_a_stack() -> None:
    model, _ = fresh("base")
    figures = Health(model, PROBE).read()
    model.stacks[-1].register_forward_hook(lambda module, inputs, output: seen.append(output))
    seen: list[torch.Tensor] = []
    model.eval()(PROBE)
    error = rounding(torch.float32, seen[0].numel())
    assert figures["health/activation/stack2"] == pytest.approx(seen[0].square().mean().sqrt().item(), rel=error)
    assert figures["health/dead_features/stack0"] == 0


def test_dead_features_are_counted_by_layer() -> None:
    """Of 4 layers of 4 features, one emits but biases, and of another one feature is dead."""
    model, _ = fresh("base")
    stack = model.stacks[1]
    with torch.no_grad():
        for layer, features in ((2, slice(None)), (3, slice(1, 2))):
            stack.attention.reduce.weight[layer, features] = 0
            stack.layer_ffn.contract.weight[layer, features] = 0
    figures = Health(model, PROBE).read()
    assert [figures[f"health/dead_features/stack{i}"] for i in range(3)] == [0, 5 / 16, 0]
    assert [figures[f"health/dead_worst_layer/stack{i}"] for i in range(3)] == [0, 1, 0]


def test_hidden_units_that_never_fire_are_dead() -> None:
    model, _ = fresh("dense relu2")
    with torch.no_grad():
        model.blocks[1].feed_forward.up.weight[:6] = 0
    figures = Health(model, PROBE).read()
    assert [figures[f"health/dead_hidden/block{i}"] for i in range(2)] == [0, 6 / 24]
    model, _ = fresh("base")
    with torch.no_grad():
        model.stacks[1].mix.expand.bias[:12] = -1e3
        model.stacks[1].layer_ffn.expand.bias[3] = -1e3
    figures = Health(model, PROBE).read()
    assert figures["health/dead_hidden/stack1"] == pytest.approx((12 + 16) / (24 + 64), abs=3 / (24 + 64))  # a few are at first
    assert figures["health/dead_features/stack1"] == 0


@pytest.mark.parametrize("name", ["dropout", "dense swiglu"])
def test_training_goes_to_the_same_bytes_whether_it_is_watched_or_not(name: str) -> None:
    ends = []
    for watching in (False, True):
        model, optimizer = fresh(name)
        watched = Health(model, PROBE)
        rows = []
        for _ in range(3):
            gradients(model)
            if watching:
                watched.before_step()
                trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
                kept = [parameter.grad.clone() for parameter in trained]
            optimizer.step()
            if watching:
                watched.after_step()
                rows.append(watched.read())
                assert all(map(torch.equal, kept, (parameter.grad for parameter in trained)))
                assert all(module.training for module in model.modules())
                assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
        ends.append((*model.state_dict().values(), torch.get_rng_state()))
    assert all(map(torch.equal, *ends))
    assert rows[0] != rows[1]


def test_equal_states_have_equal_figures_and_a_step_is_told_once() -> None:
    figures = [measured_step(*fresh("dropout")) for _ in range(2)]
    assert figures[0] == figures[1]
    model, optimizer = fresh("base")
    watched = Health(model, PROBE)
    assert {key.split("/")[1] for key in watched.read()} == {"activation", "dead_features", "dead_worst_layer", "dead_hidden"}
    gradients(model)
    watched.before_step()
    optimizer.step()
    watched.after_step()
    assert "health/update/matrix" in watched.read()
    assert "health/update/matrix" not in watched.read()


def test_what_is_not_finite_is_left_out() -> None:
    """Weights that stand at zero have no relative update, a broken stack no scale; and without gradients there are no norms."""
    model, _ = fresh("base")
    with torch.no_grad():
        model.stacks[2].mix.contract.bias.fill_(torch.inf)
        for key, role in roles(model).items():
            if role == "embedding":
                model.get_parameter(key).zero_()
    watched = Health(model, PROBE)
    watched.before_step()
    with torch.no_grad():
        model.embedding.weight += 1
    watched.after_step()
    figures = watched.read()
    assert all(map(math.isfinite, figures.values()))
    assert "health/update/embedding" in figures and "health/relative_update/embedding" not in figures
    assert "health/activation/stack1" in figures and "health/activation/stack2" not in figures
    assert not any(key.startswith("health/gradient") for key in figures)


def test_a_large_parameter_is_sampled_evenly_and_its_update_well_estimated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "SAMPLE", 2**8)
    grid = torch.arange(64 * 96).view(64, 96)
    places = sample(grid)
    assert 2**7 < len(places) <= 2**8
    assert len({place // 96 for place in places.tolist()}) == 64
    assert len({place % 96 for place in places.tolist()}) == 96
    watched = Health(model := fresh("base")[0], PROBE)
    watched.before_step()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    assert sum(part.numel() for kept in watched._before.values() for part in kept) <= 2**8 * len(list(model.parameters()))
    watched.after_step()
    count = sum(model.get_parameter(key).numel() for key, role in roles(model).items() if role == "matrix")
    error = 4 / math.sqrt(2 * 2**8)  # four standard errors of a scale that is estimated from that many numbers
    assert watched.read()["health/update/matrix"] == pytest.approx(0.1 * math.sqrt(count), rel=error)
