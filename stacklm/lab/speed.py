"""Time per training step and decoding time per token of each arm on this machine.

Arms take turns and figures are medians, so that background load affects all arms equally. Weights and tokens are random.
"""

from __future__ import annotations

import statistics
import timeit
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import NamedTuple

import numpy as np
import torch

from stacklm.code import digest
from stacklm.config.train import Train
from stacklm.data.batches import TrainBatches
from stacklm.data.shards import TokenStream
from stacklm.lab.experiment import Arm, stated
from stacklm.lab.trial import machine, own_digest
from stacklm.model.build import build
from stacklm.model.cache import Decoder
from stacklm.plan.memory import fresh_run
from stacklm.train.device import setup_device
from stacklm.train.trainer import train_step

Work = Callable[[], Callable[[], None]]
"""Untimed setup that returns the function to time."""


class Timing(NamedTuple):
    """Seconds: the median and the lower and upper quartiles."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Latency:
    """Decoding time per token of each arm, measured once and stored beside the records."""

    machine: dict[str, str]
    measured: str
    """Date of the measurement, in UTC."""
    context: int
    """Tokens of the sequence, including the new one."""
    rounds: int
    seconds: dict[str, tuple[float, ...]]
    """A `Timing` by `Arm.key`."""
    architectures: dict[str, str]
    """Digest of the measured architecture by `Arm.key`."""

    def of(self, arm: Arm) -> Timing | None:
        """The timing of an arm; None if it was not measured, or its shape has changed since."""
        same = self.architectures.get(arm.key) == _shape(arm)
        return Timing(*self.seconds[arm.key]) if same else None


def seconds_per_step(arms: Sequence[Arm], vocab_size: int, rounds: int = 5) -> dict[str, float]:
    """Seconds of one optimizer step of the trainer, with all settings of training, by `Arm.key`."""
    with _threads():
        steps = {arm.key: _training(arm, vocab_size) for arm in arms}
        return {key: timing.median for key, timing in zip(steps, _timed(list(steps.values()), rounds), strict=True)}


def decode_latency(arms: Sequence[Arm], vocab_size: int, context: int, rounds: int = 25) -> Latency:
    """Measure the decoding time of the last token of one full-context sequence, with a KV cache, on one CPU thread."""
    with _threads():
        torch.set_num_threads(1)
        timings = _timed([_decoding(arm, vocab_size, context) for arm in arms], rounds)
    return Latency(
        machine=machine(),
        measured=f"{datetime.now(UTC).date()}",
        context=context,
        rounds=rounds,
        seconds={arm.key: tuple(timing) for arm, timing in zip(arms, timings, strict=True)},
        architectures={arm.key: _shape(arm) for arm in arms},
    )


def _shape(arm: Arm) -> str:
    """Digest of the architecture without defaults, so that a setting added later does not change it."""
    return digest(stated(arm.model.architecture))[:16] + own_digest(arm.model.architecture)[:16]


def _training(arm: Arm, vocab_size: int) -> Work:
    device = setup_device(arm.train.device, arm.train.threads)
    run = fresh_run(arm.model, vocab_size, arm.train, random_batches(arm.train, vocab_size, steps=1), device)

    def step() -> None:
        train_step(run, step=1)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return lambda: step


def random_batches(train: Train, vocab_size: int, steps: int) -> TrainBatches:
    """Batches of random tokens for `steps` steps."""
    ids = np.random.default_rng(0).integers(vocab_size, size=steps * train.tokens_per_step, dtype=np.uint32)
    stream = TokenStream([ids], end_id=0, documents=1, bytes=len(ids), words=0)
    return TrainBatches(stream, train.context_length, train.global_batch_size, seed=0)


def _decoding(arm: Arm, vocab_size: int, context: int) -> Work:
    ids_1T = torch.randint(vocab_size, (1, context))
    decoder = Decoder(build(arm.model.architecture, vocab_size, context).eval(), context)

    @torch.no_grad()
    def one_token() -> None:
        decoder.head(decoder.features(ids_1T[:, -1:]))

    def read_the_others() -> Callable[[], None]:
        decoder.reset()
        decoder.features(ids_1T[:, :-1])
        return one_token

    return read_the_others


def _timed(work: Sequence[Work], rounds: int) -> list[Timing]:
    """Time each function after one warm-up round. At least two rounds are needed."""
    times = [[timeit.timeit(one(), number=1) for one in work] for _ in range(1 + rounds)]
    quartiles = (statistics.quantiles(own, method="inclusive") for own in zip(*times[1:], strict=True))
    return [Timing(median, low, high) for low, median, high in quartiles]


@contextmanager
def _threads() -> Iterator[None]:
    """Restore the number of threads at the end of the block."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)
