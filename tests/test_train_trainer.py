from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from train_files import MODELS, OPTIMIZER, TRAIN, VOCAB, write_cycle

from stacklm.data.batches import TrainBatches
from stacklm.data.shards import Shards
from stacklm.files import read_jsonl
from stacklm.model.build import build
from stacklm.train.assemble import assemble
from stacklm.train.errors import NonFiniteError
from stacklm.train.guard import Guard
from stacklm.train.health import Health
from stacklm.train.loss import Objective, token_losses
from stacklm.train.optimizer import build_optimizer
from stacklm.train.trainer import Run, accumulate, train, update
from stacklm.train.validate import Score


def make_run(folder: Path, **changes) -> Run:
    """A dense run that is judged by a constant."""
    config = replace(TRAIN, **changes)
    shards = Shards.open(write_cycle(folder / "shards"))
    torch.manual_seed(config.seed)
    model = build(MODELS["dense"].architecture, VOCAB, config.context)
    optimizer = build_optimizer(model, OPTIMIZER)
    return Run(
        name="test",
        config=config,
        model=model,
        objective=Objective(model),
        optimizer=optimizer,
        stepper=Guard(optimizer, model, config.clip_norm, config.non_finite),
        batches=TrainBatches(shards.split("train"), config.context, config.batch_size, config.seed),
        validate=lambda: Score(tokens=1, nats=2.0, text_nats=2.0, bytes=1),
        health=Health(model, torch.zeros(1, 4, dtype=torch.long)),
        flops_per_token=10,
        identity={"config": "test"},
        work=folder / "work",
        device=torch.device("cpu"),
    )


def gradients(model: torch.nn.Module) -> list[torch.Tensor]:
    return [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("micro_batch", [1, 2, 4, 3])
def test_accumulated_gradients_are_those_of_the_mean_over_all_tokens(tmp_path: Path, micro_batch: int) -> None:
    """3 does not divide the batch: the last part has one row, and still each token counts the same."""
    run = make_run(tmp_path)
    inputs_BT, targets_BT = run.batches.batch(0)
    mean = run.objective(inputs_BT, targets_BT) / targets_BT.numel()
    mean.backward()
    wanted = gradients(run.model)
    loss = accumulate(run.objective, inputs_BT, targets_BT, micro_batch)
    assert loss == pytest.approx(mean.item(), rel=1e-6)
    torch.testing.assert_close(gradients(run.model), wanted)


def test_the_loss_reported_is_that_before_the_update(tmp_path: Path) -> None:
    run = make_run(tmp_path, steps=7)
    inputs_BT, targets_BT = run.batches.batch(0)
    untrained = token_losses(run.model, inputs_BT, targets_BT).mean().item()
    train(run)
    rows = read_jsonl(run.work / "metrics.jsonl")
    assert rows[1]["train_loss"] == pytest.approx(untrained, rel=1e-6)
    assert [row["lr"] / OPTIMIZER.peak_lr for row in rows[1:]] == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1, 0.1])
    assert [row["flops"] for row in rows] == [640 * step for step in range(8)]


def test_the_model_is_in_training_mode(tmp_path: Path) -> None:
    run = make_run(tmp_path, steps=7)
    run.model.eval()
    train(run)
    assert run.model.training


def test_gradients_are_clipped(tmp_path: Path) -> None:
    run = make_run(tmp_path, steps=7, clip_norm=1e-3)
    train(run)
    norm = torch.nn.utils.get_total_norm(gradients(run.model))
    assert read_jsonl(run.work / "metrics.jsonl")[-1]["grad_norm"] > 1e-3
    assert norm == pytest.approx(1e-3, rel=1e-3)


def test_a_long_run_reports_about_two_thousand_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stacklm.train.trainer.MAX_ROWS", 10)
    run = make_run(tmp_path, steps=24, valid_every=7)
    train(run)
    rows = read_jsonl(run.work / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 3, 6, 7, 9, 12, 14, 15, 18, 21, 24]
    assert [row["step"] for row in rows if "valid_loss" in row] == [0, 7, 14, 21, 24]
    assert [row["step"] for row in read_jsonl(run.work / "timing.jsonl")] == [row["step"] for row in rows]


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_value_that_is_not_finite_stops_before_the_update(tmp_path: Path, where: str) -> None:
    run = make_run(tmp_path)
    calls = 0

    def failing(objective: Objective, inputs: tuple, loss: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 8:
            weights.extend(parameter.detach().clone() for parameter in run.model.parameters())
            if where == "loss":
                return loss * float("nan")
            loss.register_hook(lambda gradient: gradient * float("inf"))
        return loss

    weights: list[torch.Tensor] = []
    run.objective.register_forward_hook(failing)
    with pytest.raises(NonFiniteError, match=r"step 8: .*still that of step 7.*non_finite\.jsonl.*lower peak_lr") as error:
        train(run)
    assert "nan" in str(error.value)
    assert all(map(torch.equal, weights, (parameter.detach() for parameter in run.model.parameters())))
    (saved,) = read_jsonl(run.work / "non_finite.jsonl")
    assert saved["step"] == 8
    assert saved["windows"] == run.batches.indices(7)
    assert read_jsonl(run.work / "metrics.jsonl")[-1]["step"] == 7


def test_a_step_that_is_skipped_leaves_a_row_and_its_windows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path, steps=8, non_finite="skip")
    spoil_at(run, {3, 4})
    train(run)
    rows = read_jsonl(run.work / "metrics.jsonl")
    assert [row["step"] for row in rows if row.get("skipped")] == [3, 4]
    assert [row["step"] for row in rows if "train_loss" in row] == [1, 2, 5, 6, 7, 8]
    assert [note["windows"] for note in read_jsonl(run.work / "non_finite.jsonl")] == [
        run.batches.indices(2),
        run.batches.indices(3),
    ]
    assert "step 3: the loss is nan" in capsys.readouterr().err
    assert all(parameter.isfinite().all() for parameter in run.model.parameters())


def test_too_many_skipped_in_a_row_end_the_run(tmp_path: Path) -> None:
    run = make_run(tmp_path, non_finite="skip")
    spoil_at(run, set(range(3, 30)))
    with pytest.raises(NonFiniteError, match=r"step 12: .*still that of step 2"):
        train(run)


def spoil_at(run: Run, steps: set[int]) -> None:
    """Let the loss be no number at those steps."""
    calls = 0

    def spoiling(objective: Objective, inputs: tuple, loss: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return loss * (float("nan") if calls in steps else 1)

    run.objective.register_forward_hook(spoiling)


class Reads(TorchDispatchMode):
    """Counts the numbers that are read from the device."""

    count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.count += operation is torch.ops.aten._local_scalar_dense.default
        return operation(*args, **(kwargs or {}))


def test_an_update_reads_nothing_from_the_device(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    update(run, 1)
    with Reads() as reads:
        begun = update(run, 2)
        assert reads.count == 0
        assert math.isfinite(begun.loss.item())
        assert reads.count == 1


def test_training_ends_at_stop_step_on_the_curve_of_the_horizon(tmp_path: Path) -> None:
    whole, cut = make_run(tmp_path / "whole"), make_run(tmp_path / "cut", stop_step=11)
    train(whole)
    train(cut)
    rows, of_whole = read_jsonl(cut.work / "metrics.jsonl"), read_jsonl(whole.work / "metrics.jsonl")
    assert rows[-1]["step"] == 11
    assert "valid_loss" in rows[-1]
    assert [row.get("train_loss") for row in rows] == [row.get("train_loss") for row in of_whole[:12]]


LEAN = [{"recompute": "stacks"}, {"layers_at_once": 3}, {"recompute": "stacks", "layers_at_once": 1}, {"micro_batch": 1}]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("settings", LEAN, ids=str)
def test_lean_ways_lead_to_the_same_losses(tmp_path: Path, model: str, settings: dict) -> None:
    losses = [losses_of(tmp_path / name, model, **changes) for name, changes in {"plain": {}, "lean": settings}.items()]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize("model", MODELS)
def test_bfloat16_learns_with_weights_in_float32(tmp_path: Path, model: str) -> None:
    plain, rounded = (losses_of(tmp_path / precision, model, steps=24, precision=precision) for precision in ("fp32", "bf16"))
    assert rounded != plain
    assert rounded == pytest.approx(plain, rel=0.1)


def losses_of(folder: Path, model: str, **changes) -> list[float]:
    """The training losses of a short run without dropout."""
    config = replace(TRAIN, **{"steps": 8, **changes})
    architecture = MODELS[model].architecture
    if model == "stacked":
        architecture = replace(architecture, dropout=0.0)
    run = assemble(
        "test",
        config,
        replace(MODELS[model], architecture=architecture),
        VOCAB,
        TrainBatches(Shards.open(write_cycle(folder / "shards")).split("train"), config.context, config.batch_size, config.seed),
        validate=lambda network: Score(1, 2.0, 2.0, 1),
        probe_BT=torch.zeros(1, 4, dtype=torch.long),
        identity={},
        work=folder / "work",
        device=torch.device("cpu"),
    )
    train(run)
    assert all(parameter.dtype == torch.float32 for parameter in run.model.parameters())
    return [row["train_loss"] for row in read_jsonl(run.work / "metrics.jsonl")[1:]]


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler on a CPU")
def test_a_compiled_model_has_the_same_losses(tmp_path: Path) -> None:
    plain, compiled = (losses_of(tmp_path / str(compile), "stacked", compile=compile) for compile in (False, True))
    assert compiled == pytest.approx(plain, rel=1e-4)
