"""The learning-rate range test (Smith 2015, arXiv:1506.01186): updates at a rate that rises until the loss does too.

Every update is one of training, from the weights that training starts from and on its batches, but the rate rises by the
same factor each time. Where it is too low the loss hardly falls, where it is right the loss falls fast, and behind the
place of the least loss training comes apart.

The suggestion is a tenth of the rate at which the smoothed loss is least. There the fall ends because each step already
undoes as much as it gains, and a schedule stays near its peak for long: hence the margin (the usual one, as in fastai).
The rate of steepest descent, the other usual choice, was tried and left: a language model learns first and fastest which
tokens are frequent, which any rate from 1e-3 on can do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from torch import nn
from tqdm import tqdm

from stacklm.config.model import Model
from stacklm.config.schema import ParamsError
from stacklm.config.train import Train
from stacklm.data.batches import TrainBatches
from stacklm.data.shards import Shards
from stacklm.train.assemble import assemble
from stacklm.train.guard import NonFiniteError
from stacklm.train.machine import prepare
from stacklm.train.optimizer import set_lr
from stacklm.train.prefetch import Prefetch
from stacklm.train.trainer import Run, accumulate

SMOOTHING = 0.9
"""What an exponential mean of losses keeps of itself at each update: it looks back over about ten."""
RISEN = 1.1
"""The test ends where the smoothed loss is so many times its least: for text, about where even guessing would be better."""
MARGIN = 10


@dataclass(frozen=True)
class RangeTest:
    """The learning rates and the losses (nats a token, before the update) of the updates made, and why no more were."""

    lrs: list[float]
    losses: list[float]
    ended: str

    @property
    def smoothed(self) -> list[float]:
        return smooth(self.losses)

    @property
    def best(self) -> int:
        """The update with the least smoothed loss."""
        return min(range(len(self.losses)), key=self.smoothed.__getitem__)

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
    `DataError` for missing or damaged shards, and `NonFiniteError` where the very first loss or gradient is no number.
    """
    if not 0 < low < high:
        raise ParamsError(f"lr-find: the learning rate rises from low to high, so 0 < low < high, not {low:g} and {high:g}")
    if steps < 2:
        raise ParamsError(f"lr-find: a range takes at least 2 updates, not {steps}")
    device = prepare(config.device, config.threads)
    data = Shards.open(shards)
    batches = TrainBatches(data.split("train"), config.context, config.batch_size, config.seed)
    run = assemble(
        name,
        config,
        model,
        data.vocab_size,
        batches=Prefetch(batches, device),
        validate=lambda network: None,
        identity={},
        work=Path(),
        device=device,
    )
    run.model.train()
    lrs = [low * (high / low) ** (i / (steps - 1)) for i in range(steps)]
    losses: list[float] = []
    with tqdm(lrs, desc=name, unit="step", mininterval=0.5) as bar:
        for i, lr in enumerate(bar):
            loss = update(run, i, lr / model.optimizer.peak_lr)
            if not math.isfinite(loss):
                break
            losses.append(loss)
            smoothed = smooth(losses)
            bar.set_postfix_str(f"learning rate {lr:.1e}, loss {smoothed[-1]:.3f}", refresh=False)
            if smoothed[-1] > RISEN * min(smoothed):
                return RangeTest(lrs[: i + 1], losses, f"then the loss had risen to {RISEN} times its least")
        else:
            return RangeTest(lrs, losses, "the whole range")
    if not losses:
        raise NonFiniteError(f"{name}: the loss or gradient of fresh weights is no number; no learning rate can help")
    return RangeTest(lrs[:i], losses, f"then the loss or the gradient was no number, at {lr:.1e}")


def update(run: Run, i: int, factor: float) -> float:
    """The i-th update, as training does it, at so many times the peak rates; its loss, or NaN where that or a gradient is none."""
    set_lr(run.optimizer, factor)
    inputs_BT, targets_BT = (tensor.to(run.device) for tensor in run.batches.batch(i))
    with run.arithmetic():
        loss = accumulate(run.model, inputs_BT, targets_BT, run.config.micro_batch)
    norm = nn.utils.clip_grad_norm_(run.model.parameters(), run.config.clip_norm)
    run.guard.step(loss, norm)
    return loss.item() if math.isfinite(norm) else math.nan


def smooth(losses: list[float]) -> list[float]:
    """Exponential means of the losses so far, without the pull towards zero of a mean that begins there (as in Adam)."""
    smoothed, mean = [], 0.0
    for i, loss in enumerate(losses, start=1):
        mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
        smoothed.append(mean / (1 - SMOOTHING**i))
    return smoothed
