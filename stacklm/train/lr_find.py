"""The learning-rate range test (Smith 2015, arXiv:1506.01186): updates at a rate that rises until the loss does too.

Every update is one of training, from the weights that training starts from and on its batches, but the rate rises by the
same factor each time. The loss after each is that of one more batch, which is not trained on: batches differ by more than
neighbouring rates do. Where the rate is too low the loss hardly falls, then it falls fast, and above the rate of the least
loss training comes apart.

The suggestion is a fifth of that rate: at the least loss an update already spoils as much as it gains, and training stays
near its peak for long. A tenth is usual (as in fastai), and was too careful here. The other usual choice, the rate of steepest
descent, came no closer to the rates found by training and moved more between seeds. docs/LOG.md has the figures.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from stacklm.config.model import Model
from stacklm.config.optimizer import Muon, Optimizer
from stacklm.config.schema import ParamsError
from stacklm.config.train import Train
from stacklm.data.batches import TrainBatches
from stacklm.data.shards import Shards
from stacklm.train.assemble import assemble
from stacklm.train.errors import NonFiniteError
from stacklm.train.machine import prepare
from stacklm.train.optimizer import set_lr
from stacklm.train.prefetch import Prefetch
from stacklm.train.trainer import Run, accumulate
from stacklm.train.validate import score

SMOOTHING = 1 / 25
"""Standard deviation of the Gaussian by which losses are smoothed, as a share of the range."""
RISEN = 1.1
"""The test ends where the smoothed loss is so many times its least."""
MARGIN = 5
"""By how much the suggestion lies below the rate of the least loss."""


@dataclass(frozen=True)
class RangeTest:
    """The learning rates of the updates made, the losses after them (nats a token), and why no more were made."""

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
        """Why the suggestion can not be trusted, if so: the least loss must lie inside the range."""
        if self.best == len(self.losses) - 1:
            return f"the loss still fell at {self.lrs[-1]:.1e}, the end of the range; test up to a higher one"
        if self.lrs[self.best] < MARGIN * self.lrs[0]:
            return f"the suggestion is below {self.lrs[0]:.1e}, where the range began; test from a lower one"
        return None


def lr_find(name: str, config: Train, model: Model, shards: Path, low: float, high: float, steps: int) -> RangeTest:
    """Test learning rates from `low` to `high` in at most `steps` updates on the train split; nothing is written.

    The rates are those of `peak_lr`; a group of parameters with a peak of its own keeps its proportion to it. Equal calls have
    equal results on a CPU. It sets up this process as `pretrain` does. Raises `ParamsError` for what is no range,
    `DataError` for missing or damaged shards, and `NonFiniteError` where the first update gives no number.
    """
    if not 0 < low < high:
        raise ParamsError(f"lr-find: the learning rate rises from low to high, so 0 < low < high, not {low:g} and {high:g}")
    if steps < 2:
        raise ParamsError(f"lr-find: a range takes at least 2 updates, not {steps}")
    run = _ready(name, config, model, shards, steps)
    lrs = [low * (high / low) ** (i / (steps - 1)) for i in range(steps)]
    losses: list[float] = []
    smoothed: list[float] = []
    ended = "the whole range"
    with tqdm(lrs, desc=name, unit="step", mininterval=0.5) as bar:
        for i, lr in enumerate(bar):
            loss = update(run, i, lr / model.optimizer.peak_lr)
            if not math.isfinite(loss):
                ended = f"then the loss or the gradient was no number, at {lr:.1e}"
                break
            losses.append(loss)
            smoothed = smooth(losses, SMOOTHING * steps)
            bar.set_postfix_str(f"learning rate {lr:.1e}, loss {smoothed[-1]:.3f}", refresh=False)
            if smoothed[-1] > RISEN * min(smoothed):
                ended = f"then the loss had risen to {RISEN} times its least"
                break
    if not losses:
        raise NonFiniteError(f"{name}: already the first update, at {low:.1e}, gives a loss that is no number; begin lower")
    return RangeTest(lrs[: len(losses)], losses, smoothed, ended)


def _ready(name: str, config: Train, model: Model, shards: Path, steps: int) -> Run:
    """A run as training begins it, but that validates on the batch that comes after `steps` updates."""
    device = prepare(config.device, config.threads)
    data = Shards.open(shards)
    batches = TrainBatches(data.split("train"), config.context, config.batch_size, config.seed)
    judge = [
        (inputs_BT, targets_BT, torch.ones_like(targets_BT, dtype=torch.bool))
        for inputs_BT, targets_BT in zip(*(rows.split(config.micro_batch) for rows in batches.batch(steps)), strict=True)
    ]
    run = assemble(
        name,
        config,
        model,
        data.vocab_size,
        batches=Prefetch(batches, device),
        validate=lambda network: score(network, judge, data.token_bytes),
        probe_BT=judge[0][0],
        identity={},
        work=Path(),
        device=device,
    )
    run.model.train()
    return run


def update(run: Run, i: int, factor: float) -> float:
    """Make the i-th update, as training does it, at so many times the peak rates.

    Returns the loss after it, or NaN where the loss or gradient before it is no number.
    """
    set_lr(run.optimizer, factor)
    inputs_BT, targets_BT = (tensor.to(run.device) for tensor in run.batches.batch(i))
    try:
        loss = accumulate(run.objective, inputs_BT, targets_BT, run.config.micro_batch)
        norm = run.stepper.step(loss)
    except NonFiniteError:  # within the backward pass
        return math.nan
    return run.validate().loss if math.isfinite(loss) and math.isfinite(norm) else math.nan


def peak_lrs(optimizer: Optimizer, suggestion: float) -> dict[str, float]:
    """The learning rates to set, by their keys: a peak of its own keeps its proportion to `peak_lr`."""
    found = {"peak_lr": suggestion}
    if isinstance(optimizer, Muon):
        found["rest.peak_lr"] = float(f"{optimizer.rest.peak_lr * suggestion / optimizer.peak_lr:.1e}")
    return found


def smooth(losses: list[float], width: float) -> list[float]:
    """Means around each loss, weighted by a Gaussian of that standard deviation; near the ends, over those that are there."""
    places = np.arange(len(losses))
    weights = np.exp(-0.5 * ((places[:, None] - places) / width) ** 2)
    return (weights @ np.array(losses) / weights.sum(axis=1)).tolist()
