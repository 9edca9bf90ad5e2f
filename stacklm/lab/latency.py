"""How long each arm takes for one more token: measured on this machine, and so no part of a record or a verdict."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import torch

from stacklm.lab.experiment import Arm
from stacklm.model.build import build
from stacklm.model.cache import Decoder


def decode_latency(arms: Sequence[Arm], vocab_size: int, context: int, rounds: int = 9) -> list[float]:
    """Seconds for the last token of a full context of one sequence, with cached keys and values, on one CPU thread.

    Medians over `rounds` in which the arms take turns, so that a busy moment meets all of them. Weights are random.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        ids_1T = torch.randint(vocab_size, (1, context), generator=torch.Generator().manual_seed(0))
        decoders = [Decoder(build(arm.model.architecture, vocab_size, context).eval(), context) for arm in arms]
        for decoder in decoders:
            decoder.features(ids_1T)
        times = [[_one_token(decoder, ids_1T) for decoder in decoders] for _ in range(rounds)]
    finally:
        torch.set_num_threads(before)
    return [statistics.median(own) for own in zip(*times, strict=True)]


def _one_token(decoder: Decoder, ids_1T: torch.Tensor) -> float:
    decoder.cache.tokens -= 1
    begin = time.perf_counter()
    with torch.no_grad():
        decoder.head(decoder.features(ids_1T[:, -1:]))
    return time.perf_counter() - begin
