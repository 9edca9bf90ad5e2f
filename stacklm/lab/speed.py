"""How long each arm takes on this machine, for a training step and for one more token.

Arms take turns and figures are medians, so that a busy moment meets all of them. Weights and tokens are random.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from stacklm.lab.experiment import Arm
from stacklm.model.build import build
from stacklm.model.cache import Decoder
from stacklm.train.device import setup_device


def seconds_per_step(arms: Sequence[Arm], vocab_size: int, rounds: int = 5) -> dict[str, float]:
    """Seconds of one optimizer step with the batch, device and threads of training, by `Arm.key`."""
    with _threads():
        steps = {arm.key: _training(arm, vocab_size) for arm in arms}
        return dict(zip(steps, _medians(list(steps.values()), rounds), strict=True))


def decode_latency(arms: Sequence[Arm], vocab_size: int, context: int, rounds: int = 9) -> list[float]:
    """Seconds for the last token of a full context of one sequence, with cached keys and values, on one CPU thread."""
    with _threads():
        torch.set_num_threads(1)
        return _medians([_decoding(arm, vocab_size, context) for arm in arms], rounds)


def _training(arm: Arm, vocab_size: int) -> Callable[[], None]:
    train = arm.train
    device = setup_device(train.device, train.threads)
    model = build(arm.model.architecture, vocab_size, train.context_length).to(device).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    ids_BT = torch.randint(vocab_size, (train.micro_batch_size, train.context_length + 1), device=device)

    def step() -> None:
        optimizer.zero_grad()
        for _ in range(train.global_batch_size // train.micro_batch_size):
            F.cross_entropy(model(ids_BT[:, :-1]).flatten(0, 1), ids_BT[:, 1:].flatten()).backward()
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return step


def _decoding(arm: Arm, vocab_size: int, context: int) -> Callable[[], None]:
    ids_1T = torch.randint(vocab_size, (1, context))
    decoder = Decoder(build(arm.model.architecture, vocab_size, context).eval(), context)
    decoder.features(ids_1T[:, :-1])

    @torch.no_grad()
    def one_token() -> None:
        decoder.head(decoder.features(ids_1T[:, -1:]))
        decoder.cache.tokens -= 1

    return one_token


def _medians(work: Sequence[Callable[[], None]], rounds: int) -> list[float]:
    """Seconds of each, after one call that does not count."""
    times = [[_seconds(one) for one in work] for _ in range(1 + rounds)]
    return [statistics.median(own) for own in zip(*times[1:], strict=True)]


def _seconds(work: Callable[[], None]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


@contextmanager
def _threads() -> Iterator[None]:
    """The number of threads is as before when the body is left."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)
