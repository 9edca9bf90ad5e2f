"""Section `evaluate`: how a trained model is judged and sampled."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Literal

from stacklm.config.schema import Count, Natural, ParamsError, Range, Size, shown


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
class Benchmark:
    """A local file with items of a published benchmark, or of your own; docs/benchmarks.md says what is scored."""

    kind: Literal["blimp", "lambada", "wikitext", "multiple_choice"]
    """What the file holds: pairs of sentences, passages, articles, or questions with choices."""
    path: str
    """The file, relative to the project's root unless absolute: JSON lines, for wikitext text; also as .gz or .zst."""
    name: str = ""
    """What its results are called; by default as its kind."""
    limit: Count | None = None
    """Score so many items at most, from the top, of blimp of each of its sets; null: all."""
    context_key: str = "context"
    """Of multiple_choice: the key of the text before the choices."""
    choices_key: str = "choices"
    """Of multiple_choice: the key of the list of choices."""
    answer_key: str = "answer"
    """Of multiple_choice: the key of the right choice: its place from 0, or its text."""

    def __post_init__(self) -> None:
        if not self.path:
            raise ParamsError("path: '' is not allowed; name a file")
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", self.title):
            raise ParamsError(f"name: {shown(self.name)} is not allowed; a letter, then letters, digits, `_` and `-`")

    @property
    def title(self) -> str:
        """What its results are called."""
        return self.name or self.kind


@dataclass(frozen=True)
class Evaluate:
    """How a trained model is judged and sampled."""

    batch_size: Size = 16
    """Sequences that are scored at once; the result does not depend on it beyond rounding."""
    sample: Sample = Sample()
    """The text that each model continues."""
    benchmarks: tuple[Benchmark, ...] = ()
    """Benchmarks that each model is scored on; see docs/benchmarks.md."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to evaluate; auto: a GPU if there is one."""
    threads: Annotated[int, Range(1, 256)] = 2
    """Threads of the CPU. Fixed here and not taken from the machine, because sums over threads differ in the last bit."""

    def __post_init__(self) -> None:
        titles = [benchmark.title for benchmark in self.benchmarks]
        if twice := next((title for title in titles if titles.count(title) > 1), None):
            raise ParamsError(f"benchmarks: {twice} occurs twice; give each a `name` of its own")
