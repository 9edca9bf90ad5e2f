"""The training loop.

A `Run` is built from its settings; `train` is its loop, `train_step` one optimizer step.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from stacklm.config.model import Model
from stacklm.config.train import Train
from stacklm.data.batches import TrainBatches
from stacklm.model.build import build
from stacklm.model.count import count
from stacklm.model.layers import LanguageModel
from stacklm.progress import progress
from stacklm.train import Interrupted, NonFiniteError
from stacklm.train.checkpoint import Checkpoints, Progress
from stacklm.train.device import apply_memory_options, autocast_context
from stacklm.train.distributed import SINGLE, ProcessGroup, StopRequest, parallelize
from stacklm.train.health import Health
from stacklm.train.metrics import (
    METRICS,
    NON_FINITE,
    TIMING,
    JsonlWriter,
    LossSpikeDetector,
    Meter,
    NullWriter,
    read_rows,
    row_every,
)
from stacklm.train.optimizer import AfterBackward, InBackward, build_optimizer, lr_factor, plateau_end, set_lr
from stacklm.train.validate import Score

MOST_SKIPPED = 10
"""Number of consecutive NaN or Inf updates at which the run stops."""


class Run:
    """A model with fresh weights, determined by the settings, and everything needed to train it.

    `name` labels the progress bar, `validate` scores a model, `probe_BT` are the ids used for its health metrics, `identity`
    determines which checkpoints it may resume from, and `work` holds everything needed to resume. Weights are initialised on the
    CPU, so they are the same on every device and process of a team; later random numbers, such as those of dropout, differ.
    """

    def __init__(
        self,
        name: str,
        config: Train,
        model: Model,
        vocab_size: int,
        batches: TrainBatches,
        validate: Callable[[LanguageModel], Score],
        probe_BT: Tensor,
        identity: Mapping[str, Any],
        work: Path,
        device: torch.device,
        team: ProcessGroup = SINGLE,
    ) -> None:
        self.name, self.config, self.batches, self.identity, self.work = name, config, batches, identity, work
        self.device, self.team = device, team
        torch.manual_seed(config.seed)
        self.model = build(model.architecture, vocab_size, config.context_length)
        if device.type != "cpu":
            self.model.to(device)
        apply_memory_options(self.model, config)
        self.objective = parallelize(self.model, autocast_context(config, device), config, team)
        if not team.is_main:
            torch.manual_seed(config.seed + team.rank * 2**32)
        self.optimizer = build_optimizer(self.model, model.optimizer)
        if model.optimizer.optimizer_in_backward:
            self.stepper = InBackward(self.optimizer, self.model)
        else:
            self.stepper = AfterBackward(self.optimizer, self.model, config.max_grad_norm, config.on_nonfinite)
        self.validate = partial(validate, self.model)
        self.health = Health(self.model, probe_BT.to(device))
        self.flops_per_token = count(model.architecture, vocab_size, config.context_length).training_flops_per_token


class Update(NamedTuple):
    """An optimizer step queued on the device: its number, learning rate, and pending loss and gradient norm."""

    step: int
    lr: float
    loss: Tensor
    norm: Tensor


def train_step(run: Run, step: int, watch: bool = False, lr_share: float | None = None) -> Update:
    """One optimizer step, the one that leads to `step`, on the mean loss of its batch over all targets, in nats per token.

    The batch passes through the model in micro-batches of `micro_batch_size` rows, with gradient accumulation. Each process of a
    team takes its share of the rows; gradients are averaged in the last backward pass. The loss is that before the update. The
    learning rate is `lr_share` of its peak, by default that of the schedule. With `watch`, health metrics of gradients and
    updates are recorded.
    """
    config, objective, stepper = run.config, run.objective, run.stepper
    set_lr(run.optimizer, lr_factor(step, config) if lr_share is None else lr_share)
    inputs_BT, targets_BT = (tensor.to(run.device, non_blocking=True) for tensor in run.batches.batch(step - 1))
    micro_batches = list(zip(inputs_BT.split(config.micro_batch_size), targets_BT.split(config.micro_batch_size), strict=True))
    targets_of_each = run.batches.targets(step - 1) / run.team.size
    loss = torch.zeros((), device=run.device)
    if watch:
        run.health.before_backward()

    objective.zero_grad()
    for i, (inputs, targets) in enumerate(micro_batches, start=1):
        with nullcontext() if i == len(micro_batches) else objective.no_sync():
            share = objective(inputs, targets) / targets_of_each
            share.backward()
        loss += share.detach()
    loss = run.team.mean(loss)
    if watch:
        run.health.before_step()
    norm = stepper.clip_grad_norm()
    stepper.step(loss, norm)
    if watch:
        run.health.after_step()
    return Update(step, run.optimizer.param_groups[0]["lr"], loss, norm)


def train(run: Run) -> None:
    """Train to `config.last_step`, from the newest checkpoint in `work/checkpoints` or from the start.

    Writes `work/metrics.jsonl`, identical in equal runs, and `work/timing.jsonl`, which varies: a row for every step of a short
    run, for about 2,000 steps of a long one. Step 0 is the untrained model. The metrics of a step are read from the device while
    the next one runs. All processes of a team call this; the main one writes logs and shows progress. Raises `NonFiniteError`
    before an update that would make weights NaN or Inf, and `Interrupted` after SIGINT or SIGTERM to any process, with a
    checkpoint of the step in progress.
    """
    config, team = run.config, run.team
    run.model.train()
    milestone = partial(is_milestone, config=config)
    checkpoints = Checkpoints(run.work / "checkpoints", run.identity, config.keep_checkpoints, milestone, team)
    done = checkpoints.restore(run.model, run.optimizer, config.last_step)
    first = done.step + 1 if done else 0
    if team.is_main:
        print(f"{run.name}: {config.batch_arithmetic}")
        if done:
            print(f"{run.name}: resuming after step {done.step:,} of {config.last_step:,}")
    meter, reader = Meter(done.seconds if done else 0.0, run.device), Reader(run)
    log = JsonlWriter if team.is_main else NullWriter
    logs, every = (run.work / METRICS, run.work / TIMING), row_every(config.max_steps)
    rows = team.gather(lambda: [read_rows(path, first - 1, every) if first and team.is_main else [] for path in logs])[0]
    with (
        log(logs[0], rows[0]) as metrics,
        log(logs[1], rows[1]) as timing,
        StopRequest(patient=team.size > 1) as stop,
        progress(desc=run.name, total=config.last_step, initial=max(first - 1, 0), unit="step", disable=not team.is_main) as bar,
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

        def report_pending() -> None:
            if update := reader.pending:
                figures = reader.read()
                if due(update.step, every):
                    report(update.step, figures)

        def evaluate(step: int) -> float:
            figures = reader.read()
            score = run.validate()
            if not math.isfinite(score.loss):
                raise NonFiniteError(f"step {step}: the validation loss is {score.loss}; the last checkpoint is from before")
            figures |= {"valid_loss": score.loss, "valid_bits_per_byte": score.bits_per_byte}
            with run.objective.unsharded():
                figures |= run.health.read()
            report(step, figures)
            return score.loss

        def checkpoint(step: int, valid_loss: float | None) -> None:
            metrics.sync()
            timing.sync()
            done = Progress(step, step * config.tokens_per_step, meter.seconds)
            checkpoints.save(run.model, run.optimizer, done, valid_loss)

        for step in range(first, config.last_step + 1):
            if step > 0:
                with meter.training(config.tokens_per_step):
                    update = train_step(run, step, watch=due(step, config.eval_every))
                    report_pending()
                    reader.pending = update
                bar.update()
            valid_loss = evaluate(step) if due(step, config.eval_every) else None
            stopping = team.any(stop.signal is not None)
            if stopping or due(step, config.checkpoint_every) or milestone(step):
                report_pending()
                checkpoint(step, valid_loss)
            if stopping:
                why = stop.signal or "another process was asked to stop"
                raise Interrupted(f"{why}: stopped after step {step} of {config.last_step}; the same command resumes there")


def is_milestone(step: int, config: Train) -> bool:
    """Whether the checkpoint of a step is kept permanently; with `wsd` also that at the end of the plateau, for longer runs."""
    every = config.keep_every
    return bool(every and step % every == 0) or (config.lr_schedule == "wsd" and step == plateau_end(config))


class Reader:
    """Reads the loss and gradient norm of each update from the device, and decides whether the run may continue."""

    def __init__(self, run: Run) -> None:
        self.pending: Update | None = None
        self._run = run
        self._spikes = LossSpikeDetector()
        self._skipped = 0

    def read(self) -> dict[str, float]:
        """The metrics of the pending update, if any. Raises `NonFiniteError` if the run must stop."""
        update, self.pending = self.pending, None
        if update is None:
            return {}
        loss, norm = update.loss.item(), update.norm.item()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self._not_finite(update, loss, norm)
            return {"lr": update.lr, "skipped": 1}
        self._skipped = 0
        if warning := self._spikes.note(loss):
            self._warn(f"step {update.step:,}: {warning}")
        return {"train_loss": loss, "lr": update.lr, "grad_norm": norm}

    def _not_finite(self, update: Update, loss: float, norm: float) -> None:
        """Record what is needed to reproduce the step; return only if the policy is to skip it."""
        path, config = self._run.work / NON_FINITE, self._run.config
        sequences = self._run.batches.indices(update.step - 1)
        note = {"step": update.step, "train_loss": str(loss), "lr": update.lr, "grad_norm": str(norm), "sequences": sequences}
        if self._run.team.is_main:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(note) + "\n")
        what = f"step {update.step}: the loss is {loss} and the gradient's norm {norm}"
        self._skipped += 1
        if config.on_nonfinite == "skip" and self._skipped < MOST_SKIPPED:
            self._warn(f"{what}; skipped, its sequences are listed in {path}")
            return
        untouched = update.step - self._skipped
        raise NonFiniteError(
            f"{what}; stopped before the update, so the model is still that of step {untouched}. The batch's sequences are listed "
            f"in {path}. The learning rate was {update.lr:g}: lower peak_lr or raise train.warmup_steps"
        )

    def _warn(self, text: str) -> None:
        if self._run.team.is_main:
            tqdm.write(f"{self._run.name}: {text}", file=sys.stderr)


class Prefetch(TrainBatches):
    """The same batches, with the next one prepared by a thread while the device computes on the current one.

    Batches requested out of order are prepared on demand. For a GPU they are in pinned memory, for asynchronous copies.
    """

    def __init__(self, *arguments: Any, device: torch.device) -> None:
        super().__init__(*arguments)
        self._pinned = device.type == "cuda"
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
        self._ahead: dict[int, Future[tuple[Tensor, Tensor]]] = {}

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of a step, int64 [B, T] each. Raises what `TrainBatches` raises."""
        ahead = self._ahead.pop(step, None)
        made = ahead.result() if ahead else self._make(step)
        self._ahead = {step + 1: self._worker.submit(self._make, step + 1)}
        return made

    def _make(self, step: int) -> tuple[Tensor, Tensor]:
        inputs_BT, targets_BT = super().batch(step)
        return (inputs_BT.pin_memory(), targets_BT.pin_memory()) if self._pinned else (inputs_BT, targets_BT)
