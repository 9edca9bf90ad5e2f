"""The training loop."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from stacklm.config.train import Train
from stacklm.data.batches import TrainBatches
from stacklm.train.checkpoint import Checkpoints, Progress
from stacklm.train.errors import NonFiniteError
from stacklm.train.guard import Spikes
from stacklm.train.health import Health
from stacklm.train.interrupt import Interrupted, StopRequest
from stacklm.train.loss import Objective
from stacklm.train.metrics import Log, Meter, NoLog
from stacklm.train.optimizer import set_lr
from stacklm.train.prefetch import Prefetch
from stacklm.train.schedule import lr_factor, plateau_end
from stacklm.train.team import ALONE, Team
from stacklm.train.validate import Score

METRICS, TIMING, NON_FINITE = "metrics.jsonl", "timing.jsonl", "non_finite.jsonl"
MAX_ROWS = 2000
MOST_SKIPPED = 10
"""Steps in a row that may be skipped before the run is given up."""


class Stepper(Protocol):
    """Takes the optimizer's step once the gradients are there, if it has not been taken yet."""

    def step(self, loss: Tensor) -> Tensor:
        """Return the norm of the gradients."""


@dataclass(frozen=True)
class Run:
    """What a run is made of.

    `name` stands on its progress bar, `identity` says which checkpoints are its own, `work` keeps all it needs to resume.
    """

    name: str
    config: Train
    model: nn.Module
    objective: Objective
    optimizer: torch.optim.Optimizer
    stepper: Stepper
    batches: TrainBatches | Prefetch
    validate: Callable[[], Score]
    health: Health
    flops_per_token: int
    identity: Mapping[str, Any]
    work: Path
    device: torch.device
    team: Team = ALONE


class Update(NamedTuple):
    """An optimizer step that was asked of the device: its number, learning rate, and figures that are still to come."""

    step: int
    lr: float
    loss: Tensor
    norm: Tensor


def train(run: Run) -> None:
    """Train to `config.last_step`, from the newest checkpoint in `work/checkpoints` or from the start.

    Writes `work/metrics.jsonl`, equal in equal runs, and `work/timing.jsonl`, which varies: a row for every step of a
    short run, for about 2,000 steps of a long one. Step 0 is the untrained model. The figures of a step are read while
    the next one is under way. All processes of a team call this; the first of them writes and shows progress. Raises
    `NonFiniteError` before an update that would spoil the model, and `Interrupted` after SIGINT or SIGTERM to any process,
    with a checkpoint of the step that was under way.
    """
    config, team = run.config, run.team
    run.model.train()
    milestone = partial(is_milestone, config=config)
    checkpoints = Checkpoints(run.work / "checkpoints", run.identity, config.keep_checkpoints, milestone, team)
    done = checkpoints.restore(run.model, run.optimizer)
    first = done.step + 1 if done else 0
    if team.leads:
        print(f"{run.name}: {config.batch_arithmetic}")
        if done:
            print(f"{run.name}: resuming after step {done.step:,} of {config.last_step:,}")
    meter = Meter(done.seconds if done else 0.0, run.device)
    reader = Reader(run)
    log = Log if team.leads else NoLog
    shown = {"desc": run.name, "unit": "step", "mininterval": 0.5, "disable": not team.leads}
    with (
        log(run.work / METRICS, first - 1) as metrics,
        log(run.work / TIMING, first - 1) as timing,
        StopRequest(patient=team.size > 1) as stop,
        tqdm(total=config.last_step, initial=max(first - 1, 0), **shown) as bar,
    ):

        def due(step: int, every: int) -> bool:
            return step % every == 0 or step == config.last_step

        def report(step: int, figures: dict[str, float]) -> None:
            tokens = step * config.tokens_per_step
            usage = meter.read()
            metrics.append({"step": step, "tokens": tokens, "flops": tokens * run.flops_per_token, **figures})
            timing.append({"step": step, **usage})
            losses = ", ".join(f"{name} {figures[name]:.3f}" for name in ("train_loss", "valid_loss") if name in figures)
            bar.set_postfix_str(f"{losses}, {usage['tokens_per_second']:,.0f} tokens/s", refresh=False)

        def settle() -> None:
            """Read and report the step that was under way, if it has not been."""
            if reader.waiting:
                step, figures = reader.read()
                if due(step, row_every(config.steps)):
                    report(step, figures)

        def evaluate(step: int) -> float:
            figures = reader.read()[1] if reader.waiting else {}
            score = run.validate()
            if not math.isfinite(score.loss):
                raise NonFiniteError(f"step {step}: the validation loss is {score.loss}; the last checkpoint is from before")
            figures |= {"valid_loss": score.loss, "valid_bits_per_byte": score.bits_per_byte}
            with run.objective.looked_into():
                figures |= run.health.read()
            report(step, figures)
            return score.loss

        def checkpoint(step: int, valid_loss: float | None) -> None:
            metrics.sync()
            timing.sync()
            progress = Progress(step, step * config.tokens_per_step, meter.seconds)
            checkpoints.save(run.model, run.optimizer, progress, valid_loss)

        for step in range(first, config.last_step + 1):
            if step > 0:
                with meter.training(config.tokens_per_step):
                    begun = update(run, step, watch=due(step, config.valid_every))
                    settle()
                    reader.waiting = begun
                bar.update()
            valid_loss = evaluate(step) if due(step, config.valid_every) else None
            stopping = team.any(stop.signal is not None)
            if stopping or due(step, config.checkpoint_every) or is_milestone(step, config):
                settle()
                checkpoint(step, valid_loss)
            if stopping:
                why = stop.signal or "another process was asked to stop"
                raise Interrupted(f"{why}: stopped after step {step} of {config.last_step}; the same command resumes there")


def is_milestone(step: int, config: Train) -> bool:
    """Whether the checkpoint of a step is kept for good; with `wsd` that from which any longer run can go on is."""
    every = config.milestone_every
    return bool(every and step % every == 0) or (config.schedule == "wsd" and step == plateau_end(config))


def row_every(steps: int) -> int:
    """Steps from one row to the next in a run with that horizon."""
    return math.ceil(steps / MAX_ROWS)


def update(run: Run, step: int, watch: bool = False) -> Update:
    """Begin the optimizer step that leads to `step`: its loss is that before the update, in nats a token.

    With `watch` the model's health is told of gradients and updates.
    """
    factor = lr_factor(step, run.config)
    set_lr(run.optimizer, factor)
    inputs_BT, targets_BT = (tensor.to(run.device, non_blocking=True) for tensor in run.batches.batch(step - 1))
    if watch:
        run.health.before_backward()
    loss = run.team.mean(accumulate(run.objective, inputs_BT, targets_BT, run.config.micro_batch))
    if watch:
        run.health.before_step()
    norm = run.stepper.step(loss)
    if watch:
        run.health.after_step()
    return Update(step, run.optimizer.param_groups[0]["lr"], loss, norm)


def accumulate(objective: Objective, inputs_BT: Tensor, targets_BT: Tensor, micro_batch: int) -> Tensor:
    """Set the gradients of the mean loss over all tokens of a batch, `micro_batch` rows at a time; return that loss.

    In a team the batch is this process's share and the loss the mean over it; the gradients are those of the whole batch.
    """
    objective.zero_grad()
    total = torch.zeros((), device=inputs_BT.device)
    *earlier, last = zip(inputs_BT.split(micro_batch), targets_BT.split(micro_batch), strict=True)

    def add(inputs: Tensor, targets: Tensor) -> None:
        loss = objective(inputs, targets) / targets_BT.numel()
        loss.backward()
        total.add_(loss.detach())

    with objective.no_sync():
        for part in earlier:
            add(*part)
    add(*last)
    return total


class Reader:
    """Reads the figures of updates, one after the other, and says what they mean."""

    def __init__(self, run: Run) -> None:
        self.waiting: Update | None = None
        self._run = run
        self._spikes = Spikes()
        self._skipped = 0

    def read(self) -> tuple[int, dict[str, float]]:
        """The step that waits and its row. Raises `NonFiniteError` where it must not go on."""
        update, self.waiting = self.waiting, None
        loss, norm = update.loss.item(), update.norm.item()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self._not_finite(update, loss, norm)
            return update.step, {"lr": update.lr, "skipped": 1}
        self._skipped = 0
        if (said := self._spikes.note(loss)) and self._run.team.leads:
            tqdm.write(f"{self._run.name}: step {update.step:,}: {said}", file=sys.stderr)
        return update.step, {"train_loss": loss, "lr": update.lr, "grad_norm": norm}

    def _not_finite(self, update: Update, loss: float, norm: float) -> None:
        """Keep what is needed to play the step again; go on only where that is the policy."""
        path, config = self._run.work / NON_FINITE, self._run.config
        windows = self._run.batches.indices(update.step - 1)
        note = {"step": update.step, "train_loss": str(loss), "lr": update.lr, "grad_norm": str(norm), "windows": windows}
        if self._run.team.leads:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(note) + "\n")
        what = f"step {update.step}: the loss is {loss} and the gradient's norm {norm}"
        self._skipped += 1
        if config.non_finite == "skip" and self._skipped < MOST_SKIPPED:
            if self._run.team.leads:
                tqdm.write(f"{self._run.name}: {what}; skipped, its windows are listed in {path}", file=sys.stderr)
            return
        untouched = update.step - self._skipped
        raise NonFiniteError(
            f"{what}; stopped before the update, so the model is still that of step {untouched}. The batch's windows are listed "
            f"in {path}. The learning rate was {update.lr:g}: lower peak_lr or raise train.warmup_steps"
        )
