"""What leaks seem to gain: one small model trained with and without them on random tokens, from which nothing can be learned.

Every token of the text is drawn independently from `TEXT` equally likely ones. Without a leak a model cannot have an expected loss
below ln `TEXT`, so any lower reported loss is due to the leak. The faults exist in this module only: no setting enables them.

Dimension letters: B batch, T time, C width.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stacklm.audit.audit import Finding, certify
from stacklm.audit.data import Machinery, learning
from stacklm.config.model import Architecture, Dense
from stacklm.config.optimizer import AdamW
from stacklm.config.train import Train
from stacklm.data.batches import TrainBatches, evaluation_batches
from stacklm.data.shards import TokenStream
from stacklm.model.build import ModelConfig, build
from stacklm.model.dense import Block
from stacklm.model.layers import LanguageModel
from stacklm.train.loss import token_losses
from stacklm.train.validate import Batch

TEXT = 16
END = TEXT
FLOOR = math.log(TEXT)
CONTEXT, BATCH, STEPS, EVERY = 64, 16, 300, 25
HELD_OUT = 64
"""Sequences of the validation set."""
KEPT = 20
"""With overlapping windows, one in this many is held out for validation."""
MODEL = Dense(d_model=64, n_heads=2, n_layers=2, d_ff=128)
OPTIMIZER = AdamW(peak_lr=8e-3)
SETTINGS = Train(
    max_steps=STEPS,
    warmup_steps=1,
    context_length=CONTEXT,
    global_batch_size=BATCH,
    micro_batch_size=BATCH,
    threads=1,
    device="cpu",
)


class UpperTriangular(nn.Module):
    """Attention in which position t sees itself and all later positions: causal attention with time reversed."""

    def __init__(self, attention: nn.Module, in_training_only: bool = False) -> None:
        super().__init__()
        self.inner, self.in_training_only = attention, in_training_only

    def forward(self, x_BTC: Tensor, *rest: object) -> Tensor:
        if self.in_training_only and not self.training:
            return self.inner(x_BTC, *rest)
        return self.inner(x_BTC.flip(1), *rest).flip(1)


class Windows(TrainBatches):
    """Sequences that start at every token of the stream, in random order, except every `KEPT`-th."""

    def __init__(self, stream: TokenStream, context: int, batch_size: int, seed: int) -> None:
        super().__init__(stream, context, batch_size, seed)
        self.sequences = (len(stream) - context) * (KEPT - 1) // KEPT

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        starts = [index + index // (KEPT - 1) + 1 for index in self.indices(step)]
        return _windows(self.stream, self.context, starts)


def kept_windows(stream: TokenStream, held_out: TokenStream, context: int, batch_size: int) -> Iterator[Batch]:
    """The windows that `Windows` skips, as many as the held-out text has sequences: they overlap the training windows."""
    starts = range(0, len(stream) - context, KEPT)[: len(held_out) // context]
    for first in range(0, len(starts), batch_size):
        inputs_BT, targets_BT = _windows(stream, context, starts[first : first + batch_size])
        yield inputs_BT, targets_BT, torch.ones_like(targets_BT, dtype=torch.bool)


class Padded(TrainBatches):
    """Every sequence is a document of a different length, padded with the end token, and the loss includes the padding."""

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        inputs_BT, targets_BT = super().batch(step)
        return _padded(inputs_BT, targets_BT, self.stream.end_id)


def padded_batches(stream: TokenStream, context: int, batch_size: int) -> Iterator[Batch]:
    """Evaluation batches like those of `Padded`: the mask excludes no padding."""
    for inputs_BT, targets_BT, mask_BT in evaluation_batches(stream, context, batch_size):
        yield *_padded(inputs_BT, targets_BT, stream.end_id), torch.ones_like(mask_BT)


@dataclass(frozen=True)
class Case:
    """One way to train and to report: the fault in the model, the machinery that turns tokens into losses, and an explanation."""

    name: str
    why: str
    """Why the reported losses are what they are, in one sentence."""
    check: str = ""
    """The check of the audit that names the fault."""
    plant: Callable[[nn.Module], nn.Module] | None = None
    """Replaces each attention module."""
    machinery: Machinery = field(default_factory=Machinery)
    windows: bool = False
    """Whether to train and validate on overlapping windows, with every token in `CONTEXT` of them."""

    def build(self, architecture: Architecture, vocab_size: int, context: int) -> LanguageModel:
        """The model with the fault planted."""
        model = build(architecture, vocab_size, context)
        if self.plant:
            for part in [module for module in model.modules() if isinstance(module, Block)]:
                setattr(part, "attention", self.plant(part.attention))  # noqa: B010 (another type than declared)
        return model


CASES = (
    Case("right", "Training sees each token once, validation uses other tokens, and no position sees a later one."),
    Case("upper-triangular mask", "Every position sees the very token that it must predict.", "pairs", UpperTriangular),
    Case(
        "upper-triangular in training only",
        "In training every position sees the token that it must predict; a validation set, if there is one, reveals this at once.",
        "pairs",
        partial(UpperTriangular, in_training_only=True),
    ),
    Case(
        "overlapping windows",
        f"Every window is trained on once but every token {CONTEXT} times, so the text is memorised, and the windows held "
        "out for validation contain the same tokens.",
        "sequences",
        machinery=Machinery(train_batches=Windows),
        windows=True,
    ),
    Case(
        "padding in the loss",
        "Half of the targets are padding, which is certain once it has started and counts like text.",
        "padding",
        machinery=Machinery(train_batches=Padded, evaluation_batches=padded_batches),
    ),
)


@dataclass(frozen=True)
class Point:
    """Losses in nats per token after `step` steps: as reported, for training as a mean since the last point, and honest."""

    step: int
    train: float
    valid: float
    honest: float


@dataclass(frozen=True)
class Outcome:
    """Result of one case: its curve, and the failed checks of the audit, the case's own check first."""

    case: str
    why: str
    points: tuple[Point, ...]
    faults: tuple[Finding, ...]
    checks: int

    @property
    def last(self) -> Point:
        return self.points[-1]

    @property
    def reported(self) -> float:
        """The lower of the two reported losses."""
        return min(self.last.train, self.last.valid)

    @property
    def named(self) -> str:
        """The name of the fault in the certificate; empty if all checks passed."""
        return self.faults[0].finding.partition(":")[0] if self.faults else ""


def run_cases(at_once: int, done: Callable[[Outcome], None], steps: int = STEPS) -> list[Outcome]:
    """Train and audit all cases, `at_once` of them in parallel in separate processes; `done` is called with each outcome."""
    with ProcessPoolExecutor(min(at_once, len(CASES)), mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(run_case, case.name, steps) for case in CASES]
        for future in as_completed(futures):
            done(future.result())
    return [future.result() for future in futures]


def run_case(name: str, steps: int = STEPS) -> Outcome:
    """Audit and train one case on one thread; the result is deterministic."""
    case = next(one for one in CASES if one.name == name)
    torch.set_num_threads(1)
    with redirect_stderr(io.StringIO()):  # progress bars of several processes would mix
        found = certify(ModelConfig(MODEL, TEXT + 1, CONTEXT), SETTINGS, build=case.build, machinery=case.machinery)
    faults = sorted((check for check in found.checks if not check.passed), key=lambda check: check.name != case.check)
    backend: Any = torch.backends.mkldnn
    backend.matmul.fp32_precision = "none"  # the kernels that the audit chose suit larger models and double the time of this one
    torch.manual_seed(0)
    points = tuple(_trained(case, case.build(MODEL, TEXT + 1, CONTEXT), steps))
    return Outcome(case.name, case.why, points, tuple(faults), len(found.checks))


def _trained(case: Case, model: LanguageModel, steps: int) -> Iterator[Point]:
    """Train in place for one epoch; yield a point every `EVERY` steps."""
    sequences = steps * BATCH
    text = random_text(-(-sequences * KEPT // (KEPT - 1)) + CONTEXT if case.windows else sequences * CONTEXT, key=1)
    held_out = random_text(HELD_OUT * CONTEXT, key=2)
    reported = kept_windows(text, held_out, CONTEXT, BATCH) if case.windows else None
    valid = list(reported or case.machinery.evaluation_batches(held_out, CONTEXT, BATCH))
    losses: list[float] = []
    for loss in learning(model, text, CONTEXT, steps, case.machinery, BATCH, OPTIMIZER):
        losses.append(loss)
        if len(losses) % EVERY == 0:
            score = case.machinery.score(model, valid, np.ones(TEXT + 1, dtype=np.int64))
            yield Point(len(losses), float(np.mean(losses[-EVERY:])), score.loss, honest_loss(model, held_out, CONTEXT))


@torch.no_grad()
def honest_loss(model: LanguageModel, held_out: TokenStream, context: int, places: int = 4) -> float:
    """Nats per token of text that was not trained on, each token predicted by a pass over only the tokens before it.

    Only `places` positions of the context are sampled. For a causal model this is the loss of ordinary evaluation at them.
    """
    was_training = model.training
    model.eval()
    batches = list(evaluation_batches(held_out, context, len(held_out) // context))
    inputs_BT, targets_BT, _ = batches[0]
    lengths = range(context // places, context + 1, context // places)
    losses = [token_losses(model, inputs_BT[:, :length], targets_BT[:, :length])[:, -1].mean().item() for length in lengths]
    model.train(was_training)
    return float(np.mean(losses))


def random_text(tokens: int, key: int) -> TokenStream:
    """Independent, equally likely tokens; none is the end token."""
    ids = np.random.Philox(key=key).random_raw(tokens).astype(np.int64) % TEXT
    return TokenStream([ids], END, documents=0, bytes=0, words=0)


def _windows(stream: TokenStream, context: int, starts: Sequence[int]) -> tuple[Tensor, Tensor]:
    rows = torch.from_numpy(np.stack([stream[start : start + context + 1] for start in starts]))
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def _padded(inputs_BT: Tensor, targets_BT: Tensor, end_id: int) -> tuple[Tensor, Tensor]:
    """The first tokens of every row, a different number in each, then the end token."""
    B, T = targets_BT.shape
    kept_B1 = 1 + (torch.arange(B) * 37 % T)[:, None]
    place_T = torch.arange(T)
    return inputs_BT.where(place_T <= kept_B1, end_id), targets_BT.where(place_T < kept_B1, end_id)
