"""The learning-rate range test (Smith 2015, arXiv:1506.01186): updates at a rate that rises until the loss does too.

Every update is one of training, from the weights that training starts from and on its batches, but the rate rises by the
same factor each time. The loss after each is that of one more batch, which is not trained on: batches differ by more than
neighbouring rates do. The suggestion is a fifth of the rate of the least loss, where an update already spoils as much as it
gains; docs/LOG.md compares it with a tenth (as in fastai) and with the rate of steepest descent.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from stacklm.config.model import Model
from stacklm.config.optimizer import Muon, Optimizer
from stacklm.config.schema import ParamsError
from stacklm.config.train import Train
from stacklm.data.shards import Shards
from stacklm.progress import progress
from stacklm.train import NonFiniteError
from stacklm.train.device import setup_device
from stacklm.train.trainer import Prefetch, Run, train_step
from stacklm.train.validate import score

SMOOTHING = 1 / 25
"""Standard deviation of the Gaussian by which losses are smoothed, as a share of the range."""
RISEN = 1.1
"""The test ends where the smoothed loss is so many times its least."""
MARGIN = 5
"""By how much the suggestion lies below the rate of the least loss."""


@dataclass(frozen=True)
class RangeTest:
    """The learning rates of the updates made, the losses after them (nats per token), and why no more were made."""

    lrs: list[float]
    losses: list[float]
    smoothed: list[float]
    ended: str

    @property
    def best(self) -> int:
        """The update with the least smoothed loss."""
        return min(range(len(self.smoothed)), key=self.smoothed.__getitem__)

    @property
    def suggestion(self) -> float:
        """A peak learning rate, to two digits."""
        return float(f"{self.lrs[self.best] / MARGIN:.1e}")

    @property
    def caveat(self) -> str | None:
        """Why the suggestion cannot be trusted, if so: the least loss must lie inside the range."""
        if self.best == len(self.losses) - 1:
            return f"the loss still fell at {self.lrs[-1]:.1e}, the end of the range; test up to a higher one"
        if self.lrs[self.best] < MARGIN * self.lrs[0]:
            return f"the suggestion is below {self.lrs[0]:.1e}, where the range began; test from a lower one"
        return None


def lr_find(name: str, config: Train, model: Model, shards: Path, low: float, high: float, steps: int) -> RangeTest:
    """Test learning rates from `low` to `high` in at most `steps` updates on the train split; nothing is written.

    The rates are those of `peak_lr`; a group of parameters with a peak of its own keeps its proportion to it. Equal calls have
    equal results on a CPU. It sets up this process as `pretrain` does. Raises `ParamsError` for what is no range,
    `DataError` for missing or damaged shards, and `NonFiniteError` where the first update gives NaN or Inf.
    """
    if not 0 < low < high:
        raise ParamsError(f"lr-find: the learning rate rises from low to high, so 0 < low < high, not {low:g} and {high:g}")
    if steps < 2:
        raise ParamsError(f"lr-find: a range takes at least 2 updates, not {steps}")
    device = setup_device(config.device, config.threads)
    data = Shards.open(shards)
    batches = Prefetch(data.split("train"), config.context_length, config.global_batch_size, config.seed, device=device)
    judge = [
        (inputs_BT, targets_BT, torch.ones_like(targets_BT, dtype=torch.bool))
        for inputs_BT, targets_BT in zip(*(rows.split(config.micro_batch_size) for rows in batches.batch(steps)), strict=True)
    ]
    run = Run(
        name,
        config,
        model,
        data.vocab_size,
        batches=batches,
        validate=lambda network: score(network, judge, data.token_bytes),
        probe_BT=judge[0][0],
        identity={},
        work=Path(),
        device=device,
    )
    run.model.train()
    lrs = [low * (high / low) ** (i / (steps - 1)) for i in range(steps)]
    losses: list[float] = []
    smoothed: list[float] = []
    ended = "the whole range"
    with progress(lrs, desc=name, unit="step") as bar:
        for i, lr in enumerate(bar):
            loss = _loss_after(run, i, lr / model.optimizer.peak_lr)
            if not math.isfinite(loss):
                ended = f"then the loss or the gradient became NaN or Inf, at {lr:.1e}"
                break
            losses.append(loss)
            smoothed = smooth(losses, SMOOTHING * steps)
            bar.set_postfix_str(f"learning rate {lr:.1e}, loss {smoothed[-1]:.3f}", refresh=False)
            if smoothed[-1] > RISEN * min(smoothed):
                ended = f"then the loss had risen to {RISEN} times its least"
                break
    if not losses:
        raise NonFiniteError(f"{name}: already the first update, at {low:.1e}, gives a loss that is NaN or Inf; begin lower")
    return RangeTest(lrs[: len(losses)], losses, smoothed, ended)


def _loss_after(run: Run, i: int, share: float) -> float:
    """The loss after the i-th update, at that share of the peak rates; NaN where the loss or gradient before it is NaN or Inf."""
    try:
        update = train_step(run, i + 1, lr_share=share)
    except NonFiniteError:  # within the backward pass
        return math.nan
    return run.validate().loss if update.loss.isfinite() and update.norm.isfinite() else math.nan


def peak_lrs(optimizer: Optimizer, suggestion: float) -> dict[str, float]:
    """The learning rates to set, by their keys: a peak of its own keeps its proportion to `peak_lr`."""
    found = {"peak_lr": suggestion}
    if isinstance(optimizer, Muon):
        found["adamw.peak_lr"] = float(f"{optimizer.adamw.peak_lr * suggestion / optimizer.peak_lr:.1e}")
    return found


def smooth(losses: list[float], width: float) -> list[float]:
    """Means around each loss, weighted by a Gaussian of that standard deviation; near the ends, over those that are there."""
    places = np.arange(len(losses))
    weights = np.exp(-0.5 * ((places[:, None] - places) / width) ** 2)
    return (weights @ np.array(losses) / weights.sum(axis=1)).tolist()
