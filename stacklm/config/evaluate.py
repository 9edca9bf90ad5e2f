"""Section `evaluate`: how a trained model is judged and sampled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from stacklm.config.schema import Natural, Range, Size


@dataclass(frozen=True)
class Sample:
    """The text that each model continues, for people to read."""

    prompt: str = "def "
    """The text to continue."""
    max_new_tokens: Size = 120
    """Tokens to write at most."""
    temperature: Annotated[float, Range(0)] = 0.8
    """Divides the logits; 0: always the most likely token."""
    top_k: Natural = 50
    """Draw from the k most likely tokens; 0: from all."""
    top_p: Annotated[float, Range(0, 1, open_low=True)] = 1.0
    """Of these, draw from the fewest whose probabilities reach p."""
    seed: Natural = 1
    """Of the draws."""


@dataclass(frozen=True)
class Evaluate:
    """How a trained model is judged and sampled."""

    batch_size: Size = 16
    """Sequences that are scored at once; the result does not depend on it beyond rounding."""
    sample: Sample = Sample()
    """The text that each model continues."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to evaluate; auto: a GPU if there is one."""
    threads: Annotated[int, Range(1, 256)] = 2
    """Threads of the CPU. Fixed here and not taken from the machine, because sums over threads differ in the last bit."""
