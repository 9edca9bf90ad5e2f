"""Section `evaluate`: how a trained model is judged and sampled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from stacklm.config.schema import Count, Natural, Range


@dataclass(frozen=True)
class Sample:
    """The text that each model continues, for people to read.

    Drawn from the `top_k` likeliest tokens (0: all), and of these from the fewest whose probabilities reach `top_p`.
    """

    prompt: str = "def "
    tokens: Count = 120
    temperature: Annotated[float, Range(0)] = 0.8
    top_k: Natural = 50
    top_p: Annotated[float, Range(0, 1, open_low=True)] = 1.0
    seed: Natural = 1


@dataclass(frozen=True)
class Evaluate:
    """`batch_size` windows are scored at once; the result does not depend on it beyond rounding.

    `threads` is fixed here and not taken from the machine, because sums over threads differ in the last bit.
    """

    batch_size: Count = 16
    sample: Sample = Sample()
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    threads: Annotated[int, Range(1, 256)] = 2
