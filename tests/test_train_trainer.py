from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from train_files import MODELS, OPTIMIZER, TRAIN, VOCAB, write_cycle

from stacklm.data.batches import TrainBatches
from stacklm.data.shards import Shards
from stacklm.files import read_jsonl
from stacklm.model.build import build
from stacklm.train.guard import Guard, NonFiniteError
from stacklm.train.loss import token_losses
from stacklm.train.optimizer import build_optimizer
from stacklm.train.trainer import Run, accumulate, train
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
        optimizer=optimizer,
        guard=Guard(optimizer, config.non_finite),
        batches=TrainBatches(shards.split("train"), config.context, config.batch_size, config.seed),
        validate=lambda: Score(tokens=1, nats=2.0, text_nats=2.0, bytes=1),
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
    mean = token_losses(run.model, inputs_BT, targets_BT).mean()
    mean.backward()
    wanted = gradients(run.model)
    loss = accumulate(run.model, inputs_BT, targets_BT, micro_batch)
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
def test_a_value_that_is_not_finite_stops_before_the_update(tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path)
    calls = 0

    def failing(model: torch.nn.Module, inputs_BT: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        losses_BT = token_losses(model, inputs_BT, targets_BT)
        if calls < 8:
            return losses_BT
        weights.extend(parameter.detach().clone() for parameter in model.parameters())
        if where == "loss":
            return losses_BT * float("nan")
        losses_BT.register_hook(lambda gradient: gradient * float("inf"))
        return losses_BT

    weights: list[torch.Tensor] = []
    monkeypatch.setattr("stacklm.train.trainer.token_losses", failing)
    with pytest.raises(NonFiniteError, match=r"step 8: .*still that of step 7.*non_finite\.jsonl.*lower peak_lr") as error:
        train(run)
    assert "nan" in str(error.value)
    assert all(map(torch.equal, weights, (parameter.detach() for parameter in run.model.parameters())))
    (saved,) = read_jsonl(run.work / "non_finite.jsonl")
    assert saved["step"] == 8
    assert saved["windows"] == run.batches.indices(7)
    assert read_jsonl(run.work / "metrics.jsonl")[-1]["step"] == 7
