"""One optimizer step, the loop around it, and the effect of every setting on the trained weights."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stacklm.config.model import Model
from stacklm.config.optimizer import Adafactor, AdamW, Muon, Optimizer, Rest
from stacklm.data.batches import IGNORED, TrainBatches
from stacklm.data.shards import Shards, TokenStream
from stacklm.files import read_jsonl
from stacklm.train import NonFiniteError
from stacklm.train.loss import Objective, token_losses
from stacklm.train.trainer import Run, train, train_step
from stacklm.train.validate import Score
from support.operations import Operations
from support.rounding import assert_same, drift, rounding
from support.train_files import MODELS, OPTIMIZER, TRAIN, VOCAB, write_cycle, write_text

DENSE, STACKED = MODELS["dense"], MODELS["stacked"]
WITHOUT_DROPOUT = {"dense": DENSE, "stacked": replace(STACKED, architecture=replace(STACKED.architecture, dropout=0.0))}
TOKENS = TRAIN.tokens_per_step


def make_run(folder: Path, model: Model = DENSE, stream: TokenStream | None = None, **changes: Any) -> Run:
    """A run over the cycle, or over `stream`, that is judged by a constant."""
    config = replace(TRAIN, **changes)
    stream = stream or Shards.open(write_cycle(folder / "shards")).split("train")
    batches = TrainBatches(stream, config.context_length, config.global_batch_size, config.seed)
    score, probe_BT = Score(tokens=1, nats=2.0, text_nats=2.0, bytes=1), torch.zeros(1, 4, dtype=torch.long)
    return Run("test", config, model, VOCAB, batches, lambda _: score, probe_BT, {}, folder / "work", torch.device("cpu"))


def rows_of(run: Run, name: str = "metrics") -> list[dict]:
    return read_jsonl(run.work / f"{name}.jsonl")


def gradients(run: Run) -> Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in run.model.parameters() if parameter.requires_grad])


@pytest.mark.parametrize("asked", [1.0, 0.2])
@pytest.mark.parametrize("micro_batch_size", [1, 2, 4, 3])
def test_accumulated_gradients_are_those_of_the_mean_over_all_targets(tmp_path: Path, micro_batch_size: int, asked: float) -> None:
    """3 does not divide the batch: the last part has one row, and still each token counts the same, or each that is asked for."""
    stream = Shards.open(write_cycle(tmp_path / "shards")).split("train")
    stream.targets = np.random.default_rng(1).random(len(stream)) < asked
    run = make_run(tmp_path, stream=stream, max_grad_norm=None)
    object.__setattr__(run.config, "micro_batch_size", micro_batch_size)
    inputs_BT, targets_BT = run.batches.batch(0)
    asked_BT = targets_BT != IGNORED
    assert asked_BT.all() if asked == 1 else len({int(row.sum()) for row in asked_BT}) > 1
    mean = torch.nn.functional.cross_entropy(run.model(inputs_BT)[asked_BT], targets_BT[asked_BT])
    mean.backward()
    wanted = gradients(run)
    update = train_step(run, 1)
    assert_same(update.loss, mean.detach(), TOKENS)
    assert_same(gradients(run), wanted, TOKENS * VOCAB)


def test_rows_tell_loss_before_the_update_learning_rate_and_flops(tmp_path: Path, stream: TokenStream) -> None:
    run = make_run(tmp_path, DENSE, stream, max_steps=7)
    untrained = token_losses(run.model, *run.batches.batch(0)).mean().item()
    train(run)
    rows = rows_of(run)
    assert rows[1]["train_loss"] == pytest.approx(untrained, rel=rounding(torch.float32, TOKENS))
    assert [row["lr"] / OPTIMIZER.peak_lr for row in rows[1:]] == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1, 0.1])
    assert [row["flops"] for row in rows] == [run.flops_per_token * TOKENS * step for step in range(8)]


def test_gradients_are_clipped_and_the_model_is_in_training_mode(tmp_path: Path) -> None:
    run = make_run(tmp_path, max_steps=7, max_grad_norm=1e-3)
    run.model.eval()
    train(run)
    assert run.model.training
    assert rows_of(run)[-1]["grad_norm"] > 1e-3
    assert gradients(run).norm() == pytest.approx(1e-3, rel=1e-3)  # it divides by the norm + 1e-6, and the norm is above 1e-3


def test_a_long_run_reports_about_two_thousand_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stacklm.train.metrics.MAX_ROWS", 10)
    run = make_run(tmp_path, max_steps=24, eval_every=7)
    train(run)
    assert [row["step"] for row in rows_of(run)] == [0, 3, 6, 7, 9, 12, 14, 15, 18, 21, 24]
    assert [row["step"] for row in rows_of(run) if "valid_loss" in row] == [0, 7, 14, 21, 24]
    assert [row["step"] for row in rows_of(run, "timing")] == [row["step"] for row in rows_of(run)]


def test_training_ends_at_hard_stop_on_the_curve_of_the_horizon(tmp_path: Path) -> None:
    whole, cut = make_run(tmp_path / "whole"), make_run(tmp_path / "cut", hard_stop=11)
    train(whole)
    train(cut)
    assert rows_of(cut)[-1]["step"] == 11 and "valid_loss" in rows_of(cut)[-1]
    assert [row.get("train_loss") for row in rows_of(cut)] == [row.get("train_loss") for row in rows_of(whole)[:12]]


def spoil_at(run: Run, steps: range | set[int], where: str = "loss") -> list[Tensor]:
    """Make loss or gradient NaN or Inf at those steps; returns the weights before the first of them, once it has come."""
    calls, weights = 0, []

    def spoiling(objective: Objective, inputs: tuple, loss: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls not in steps:
            return loss
        weights.extend(parameter.detach().clone() for parameter in run.model.parameters() if calls == min(steps))
        if where == "loss":
            return loss * math.nan
        loss.register_hook(lambda gradient: gradient * math.inf)
        return loss

    run.objective.register_forward_hook(spoiling)
    return weights


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_value_that_is_not_finite_stops_before_the_update(tmp_path: Path, where: str) -> None:
    run = make_run(tmp_path)
    weights = spoil_at(run, {8}, where)
    with pytest.raises(NonFiniteError, match=r"step 8: .*nan.*still that of step 7.*nonfinite\.jsonl.*lower peak_lr"):
        train(run)
    assert all(map(torch.equal, weights, (parameter.detach() for parameter in run.model.parameters())))
    (saved,) = rows_of(run, "nonfinite")
    assert saved["step"] == 8 and saved["sequences"] == run.batches.indices(7)
    assert rows_of(run)[-1]["step"] == 7


def test_a_step_that_is_skipped_leaves_a_row_and_its_sequences(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path, max_steps=8, on_nonfinite="skip")
    spoil_at(run, {3, 4})
    train(run)
    assert [row["step"] for row in rows_of(run) if row.get("skipped")] == [3, 4]
    assert [row["step"] for row in rows_of(run) if "train_loss" in row] == [1, 2, 5, 6, 7, 8]
    assert [note["sequences"] for note in rows_of(run, "nonfinite")] == [run.batches.indices(step) for step in (2, 3)]
    assert "step 3: the loss is nan" in capsys.readouterr().err
    assert all(parameter.isfinite().all() for parameter in run.model.parameters())


def test_too_many_skipped_in_a_row_end_the_run(tmp_path: Path) -> None:
    run = make_run(tmp_path, on_nonfinite="skip")
    spoil_at(run, range(3, 30))
    with pytest.raises(NonFiniteError, match=r"step 12: .*still that of step 2"):
        train(run)


def test_an_update_reads_nothing_from_the_device(tmp_path: Path) -> None:
    """The canary of torch's `_step_supports_amp_scaling` and `found_inf`, by which fused optimizers pass over a step."""
    run = make_run(tmp_path)
    train_step(run, 1)
    reading = torch.ops.aten._local_scalar_dense.default
    with Operations() as done:
        update = train_step(run, 2)
        assert done.counts[reading] == 0
        assert math.isfinite(update.loss.item())
        assert done.counts[reading] == 1


def losses_of(folder: Path, model: str, **changes: Any) -> list[float]:
    """The training losses of a short run without dropout."""
    run = make_run(folder, WITHOUT_DROPOUT[model], **{"max_steps": 8, **changes})
    train(run)
    assert all(parameter.dtype == torch.float32 for parameter in run.model.parameters())
    return [row["train_loss"] for row in rows_of(run)[1:]]


COMPILER = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler")
SAVING = [{"activation_checkpointing": "full"}, {"micro_batch_size": 1}]


@pytest.mark.parametrize("changes", SAVING, ids=str)
@pytest.mark.parametrize("model", MODELS)
def test_what_saves_memory_or_time_leads_to_the_same_losses(tmp_path: Path, model: str, changes: dict) -> None:
    plain, saving = (losses_of(tmp_path / name, model, **some) for name, some in {"plain": {}, "saving": changes}.items())
    assert saving == pytest.approx(plain, rel=drift(8, TOKENS * VOCAB))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=[COMPILER, pytest.mark.slow])])
def test_compiled_code_leads_to_the_same_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    """Traced forwards and backwards, and run as it is; or made into C++, which takes a compiler most of a minute."""
    compiled, original = [], nn.Module.compile

    def compile_by(module: nn.Module, **settings: Any) -> None:
        compiled.append(module)
        original(module, backend=backend, **settings)

    monkeypatch.setattr(nn.Module, "compile", compile_by)
    plain, saving = (losses_of(tmp_path / str(compile), "stacked", compile=compile) for compile in (False, True))
    assert compiled and saving == pytest.approx(plain, rel=drift(8, TOKENS * VOCAB))


@pytest.mark.parametrize("model", MODELS)
def test_bfloat16_learns_with_weights_in_float32(tmp_path: Path, model: str) -> None:
    plain, rounded = (losses_of(tmp_path / precision, model, max_steps=24, precision=precision) for precision in ("fp32", "bf16"))
    assert rounded != plain
    assert rounded == pytest.approx(plain, rel=0.1)  # the loss falls by more than half: it has learnt about as much


SHORT = {"max_steps": 4, "warmup_steps": 1, "final_lr_fraction": 0.5}


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> TokenStream:
    return Shards.open(write_text(tmp_path_factory.mktemp("shards"))).split("train")


def trained(
    stream: TokenStream, changes: dict | None = None, optimizer: Optimizer = OPTIMIZER, steps: int = 3
) -> dict[str, Tensor]:
    """The weights after a few steps of those of the shortest run."""
    run = make_run(Path("unused"), replace(STACKED, optimizer=optimizer), stream, **{**SHORT, **(changes or {})})
    run.model.train()
    for step in range(1, steps + 1):
        train_step(run, step)
    return {name: weight.detach().clone() for name, weight in run.model.named_parameters()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


EFFECTIVE = [
    {"seed": 2},
    {"warmup_steps": 2},
    {"max_steps": 5},
    {"lr_schedule": "linear"},
    {"lr_schedule": "wsd", "decay_fraction": 0.5},
    {"final_lr_fraction": 0.4},
    {"max_grad_norm": 0.01},
    {"max_grad_norm": None},
    {"precision": "bf16"},
]


@pytest.mark.parametrize("change", EFFECTIVE, ids=str)
def test_what_changes_the_weights(stream: TokenStream, change: dict[str, Any]) -> None:
    """The bound on gradients that others are compared with is below all of them, so that it clips."""
    base = {"max_grad_norm": 0.02} if "max_grad_norm" in change else {}
    assert not same(trained(stream, change), trained(stream, base))


@pytest.mark.parametrize("change", [{"eval_every": 2}, {"eval_tokens": 7}, {"checkpoint_every": 1}, {"hard_stop": 3}], ids=str)
def test_what_does_not(stream: TokenStream, change: dict[str, Any]) -> None:
    assert same(trained(stream, change), trained(stream))


def test_the_seed_fixes_the_weights_that_training_starts_from(stream: TokenStream) -> None:
    one, again, other = (trained(stream, {"seed": seed}, steps=0) for seed in (1, 1, 2))
    assert same(one, again)
    assert not torch.equal(one["embedding.weight"], other["embedding.weight"])


USED: dict[Optimizer, list[dict[str, Any]]] = {
    AdamW(): [{"peak_lr": 2e-3}, {"beta1": 0.8}, {"beta2": 0.9}, {"eps": 1e-4}, {"weight_decay": 0.2}],
    Muon(): [
        *({"peak_lr": 2e-3}, {"momentum": 0.9}, {"ns_steps": 4}, {"weight_decay": 0.2}),
        *({"adamw": Rest(**{key: value})} for key, value in {"peak_lr": 2e-3, "beta1": 0.8, "beta2": 0.9, "eps": 1e-4}.items()),
    ],
    Adafactor(): [{"peak_lr": 2e-2}, {"beta2_decay": -0.5}, {"eps": 1e-1}, {"weight_decay": 0.1}],
}


@pytest.mark.parametrize("settings", USED, ids=lambda settings: settings.kind)
def test_every_setting_of_an_optimizer_is_used(stream: TokenStream, settings: Optimizer) -> None:
    found = [trained(stream, optimizer=settings)]
    found += [trained(stream, optimizer=replace(settings, **change)) for change in USED[settings]]
    assert [same(found[0], other) for other in found[1:]] == [False] * len(USED[settings])
    assert not any(same(found[0], trained(stream, optimizer=other)) for other in USED if other != settings)
