"""The training loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from stacklm.config.train import Train
from stacklm.data.batches import TrainBatches
from stacklm.files import write_json
from stacklm.train.checkpoint import Checkpoints, Progress
from stacklm.train.interrupt import Interrupted, StopRequest
from stacklm.train.loss import token_losses
from stacklm.train.metrics import Log, Meter
from stacklm.train.optimizer import set_lr
from stacklm.train.schedule import lr_factor
from stacklm.train.validate import Score

METRICS, TIMING, NON_FINITE = "metrics.jsonl", "timing.jsonl", "non_finite.json"
MAX_ROWS = 2000


class NonFiniteError(RuntimeError):
    """A loss or gradient that is not a number; the model was not updated with it."""


@dataclass(frozen=True)
class Run:
    """What a run is made of.

    `name` stands on its progress bar, `identity` says which checkpoints are its own, `work` keeps all it needs to resume.
    """

    name: str
    config: Train
    model: nn.Module
    optimizer: torch.optim.Optimizer
    batches: TrainBatches
    validate: Callable[[], Score]
    flops_per_token: int
    identity: Mapping[str, Any]
    work: Path
    device: torch.device


def train(run: Run) -> None:
    """Train to `config.steps`, from the newest checkpoint in `work/checkpoints` or from the start.

    Writes `work/metrics.jsonl`, equal in equal runs, and `work/timing.jsonl`, which varies: a row for every step of a
    short run, for about 2,000 steps of a long one. Step 0 is the untrained model. Raises `NonFiniteError` before an
    update that would spoil the model, and `Interrupted` after SIGINT or SIGTERM, with a checkpoint of the step that
    was under way.
    """
    config = run.config
    run.model.train()
    checkpoints = Checkpoints(run.work / "checkpoints", run.identity, config.keep_checkpoints)
    done = checkpoints.restore(run.model, run.optimizer)
    last = done.step if done else -1
    if done:
        print(f"{run.name}: resuming after step {done.step:,} of {config.steps:,}")
    meter = Meter(done.seconds if done else 0.0, run.device)
    with (
        Log(run.work / METRICS, last) as metrics,
        Log(run.work / TIMING, last) as timing,
        StopRequest() as stop,
        tqdm(total=config.steps, initial=max(last, 0), desc=run.name, unit="step", mininterval=0.5) as bar,
    ):

        def due(step: int, every: int) -> bool:
            return step % every == 0 or step == config.steps

        def evaluate() -> dict[str, float]:
            score = run.validate()
            return {"valid_loss": score.loss, "valid_bits_per_byte": score.bits_per_byte}

        def report(step: int, figures: dict[str, float]) -> None:
            tokens = step * config.tokens_per_step
            usage = meter.read()
            metrics.append({"step": step, "tokens": tokens, "flops": tokens * run.flops_per_token, **figures})
            timing.append({"step": step, **usage})
            losses = ", ".join(f"{name} {figures[name]:.3f}" for name in ("train_loss", "valid_loss") if name in figures)
            bar.set_postfix_str(f"{losses}, {usage['tokens_per_second']:,.0f} tokens/s", refresh=False)

        def checkpoint(step: int) -> None:
            metrics.sync()
            timing.sync()
            checkpoints.save(run.model, run.optimizer, Progress(step, step * config.tokens_per_step, meter.seconds))

        for step in range(last + 1, config.steps + 1):
            figures: dict[str, float] = {}
            if step > 0:
                with meter.training(config.tokens_per_step):
                    figures |= update(run, step)
                bar.update()
            if due(step, config.valid_every):
                figures |= evaluate()
            if "valid_loss" in figures or due(step, math.ceil(config.steps / MAX_ROWS)):
                report(step, figures)
            if stop.signal or due(step, config.checkpoint_every):
                checkpoint(step)
            if stop.signal:
                raise Interrupted(f"{stop.signal}: stopped after step {step} of {config.steps}; the same command resumes there")


def update(run: Run, step: int) -> dict[str, float]:
    """The optimizer step that leads to `step`: its loss (nats/token, before the update), learning rate and gradient norm."""
    set_lr(run.optimizer, lr_factor(step, run.config))
    inputs_BT, targets_BT = (tensor.to(run.device) for tensor in run.batches.batch(step - 1))
    loss = accumulate(run.model, inputs_BT, targets_BT, run.config.micro_batch)
    norm = nn.utils.clip_grad_norm_(run.model.parameters(), run.config.clip_norm).item()
    figures = {"train_loss": loss, "lr": run.optimizer.param_groups[0]["lr"], "grad_norm": norm}
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise _not_finite(run, step, figures)
    run.optimizer.step()
    return figures


def accumulate(model: nn.Module, inputs_BT: torch.Tensor, targets_BT: torch.Tensor, micro_batch: int) -> float:
    """Set the gradients of the mean loss over all tokens of a batch, `micro_batch` rows at a time; return that loss."""
    model.zero_grad()
    total = torch.zeros((), device=inputs_BT.device)
    for inputs, targets in zip(inputs_BT.split(micro_batch), targets_BT.split(micro_batch), strict=True):
        loss = token_losses(model, inputs, targets).sum() / targets_BT.numel()
        loss.backward()
        total += loss.detach()
    return total.item()


def _not_finite(run: Run, step: int, figures: dict[str, float]) -> NonFiniteError:
    path = run.work / NON_FINITE
    values = {name: str(value) for name, value in figures.items()}
    write_json(path, {"step": step, **values, "windows": run.batches.indices(step - 1)})
    return NonFiniteError(
        f"step {step}: the loss is {figures['train_loss']} and the gradient's norm {figures['grad_norm']}; stopped before the "
        f"update, so the model is still that of step {step - 1}. The batch's windows are listed in {path}. "
        f"The learning rate was {figures['lr']:g}: lower peak_lr or raise train.warmup_steps"
    )
