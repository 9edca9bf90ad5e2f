"""Benchmark scores from log-likelihoods of continuations; the lm-eval plug-in uses the same function.

Sequences are scored one at a time. In a batch the last digits would depend on the other sequences, since kernels sum in a
different order for other shapes; alone they depend only on model, text, device and number of threads.

Dimension letters: T tokens of a chunk, V vocabulary.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stacklm.config.evaluate import Benchmark, Evaluate
from stacklm.data.benchmarks import Item, read_items
from stacklm.data.tokenizer import Tokenizer
from stacklm.evaluate.generate import open_model
from stacklm.model.layers import LanguageModel
from stacklm.progress import progress

LEVEL = 0.05
"""Error rate of the intervals."""
DRAWS = 4_000
"""Number of bootstrap resamples."""
UNITS = {"blimp": "pairs", "lambada": "passages", "wikitext": "articles", "multiple_choice": "questions"}
"""The unit of resampling, for the intervals of each benchmark."""

Answers = Sequence[tuple[float, bool]]
"""For each continuation of an item: log-likelihood in nats, and whether each of its tokens is the most likely one."""


@dataclass(frozen=True)
class Scorer:
    """A trained model in evaluation mode that scores items."""

    model: LanguageModel
    context: int
    words: Tokenizer

    @classmethod
    def load(cls, config: Evaluate, trained: Path, tokenizer: Path) -> Scorer:
        """Load the model in the folder `trained`. Raises `StoreError` if model and tokenizer do not belong together."""
        return cls(*open_model(config, trained, tokenizer))

    def answer(self, item: Item) -> list[tuple[float, bool]]:
        return [self.loglikelihood(*self.encode(item.context, continuation)) for continuation in item.continuations]

    def encode(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Return the ids of both, split as in lm-eval: encoded together, white space between them moved to the continuation."""
        before = self.words.encode(context.rstrip())
        return before, self.words.encode(context + continuation)[len(before) :]

    @torch.inference_mode()
    def loglikelihood(self, context: Sequence[int], continuation: Sequence[int]) -> tuple[float, bool]:
        """Return the log-likelihood of a continuation, in nats, and whether it is the greedy one.

        The continuation is scored in chunks of at most the context length, each given all preceding tokens that fit; the context
        is truncated on the left. An empty context is replaced by the end token, which starts a document. Raises `ValueError` for
        a continuation without a token, such as one that merges into the context's last token.
        """
        if not continuation:
            raise ValueError("a continuation without a token of its own has no likelihood; let it begin with a space")
        context = context or [self.words.end_id]
        ids = torch.tensor([*context, *continuation], device=next(self.model.parameters()).device)
        total, greedy = 0.0, True
        for start in range(len(context), len(ids), self.context):
            stop = min(start + self.context, len(ids))
            targets_T = ids[start:stop]
            features = self.model.features(ids[None, max(stop - self.context - 1, 0) : stop - 1])
            logits_TV = self.model.head(features[0, start - stop :]).float()
            chosen_T = logits_TV.log_softmax(-1).gather(-1, targets_T[:, None])
            total += chosen_T.double().sum().item()
            greedy = greedy and bool((logits_TV.argmax(-1) == targets_T).all())
        return total, greedy


def run_benchmarks(
    scorer: Scorer, benchmarks: Iterable[Benchmark], read: Callable[[Benchmark], list[Item]] = read_items
) -> dict[str, dict[str, Any]]:
    """Return the figures of each benchmark by title. Raises `DataError` if a file cannot be used."""
    found = {}
    for benchmark in benchmarks:
        items = read(benchmark)
        answers = [scorer.answer(item) for item in progress(items, desc=f"evaluate {benchmark.title}", unit="item")]
        found[benchmark.title] = {
            "kind": benchmark.kind,
            "items": len(items),
            "unit": UNITS[benchmark.kind],
            **FIGURES[benchmark.kind](items, answers),
        }
    return found


def _blimp(items: Sequence[Item], answers: Sequence[Answers]) -> dict[str, Any]:
    """A pair is correct if the grammatical sentence is strictly more likely; accuracy over all pairs and per named set."""
    sets: dict[str, list[bool]] = defaultdict(list)
    for item, ((good, _), (bad, _)) in zip(items, answers, strict=True):
        sets[item.group].append(good > bad)
    return {
        "chance": 0.5,
        "ties": sum(good == bad for (good, _), (bad, _) in answers),
        "scores": {"accuracy": share([right for one in sets.values() for right in one])},
        "sets": {name: {"items": len(rights), **share(rights)} for name, rights in sets.items()},
    }


def _lambada(items: Sequence[Item], answers: Sequence[Answers]) -> dict[str, Any]:
    """A passage is correct if every token of its last word is the most likely one; perplexity is over last words."""
    nats = [-total for ((total, _),) in answers]
    scores = {"accuracy": share([greedy for ((_, greedy),) in answers]), "perplexity": perplexity(nats, [1] * len(nats))}
    return {"scores": scores}


def _wikitext(items: Sequence[Item], answers: Sequence[Answers]) -> dict[str, Any]:
    """Word perplexity and bits per byte of detokenized articles, counting words and bytes of the text before detokenization."""
    nats = [-total for ((total, _),) in answers]
    bits = mean_interval([one / math.log(2) for one in nats], [item.bytes for item in items])
    return {"scores": {"word_perplexity": perplexity(nats, [item.words for item in items]), "bits_per_byte": bits}}


def _multiple_choice(items: Sequence[Item], answers: Sequence[Answers]) -> dict[str, Any]:
    """The most likely choice (the first, if tied) must be the correct one: by log-likelihood, per character, and per byte."""
    rights: dict[str, list[bool]] = {"accuracy": [], "accuracy_norm": [], "accuracy_bytes": []}
    ties = 0
    for item, choices in zip(items, answers, strict=True):
        totals = np.array([total for total, _ in choices])
        texts = [continuation[1:] for continuation in item.continuations]  # without the space before it
        for name, sizes in (
            ("accuracy", np.ones(len(texts))),
            ("accuracy_norm", np.array([len(text) for text in texts])),
            ("accuracy_bytes", np.array([len(text.encode()) for text in texts])),
        ):
            rights[name].append(int(np.argmax(totals / sizes)) == item.answer)
        ties += int((totals == totals.max()).sum() > 1)
    chance = float(np.mean([1 / len(item.continuations) for item in items]))
    return {"chance": chance, "ties": ties, "scores": {name: share(values) for name, values in rights.items()}}


FIGURES = {"blimp": _blimp, "lambada": _lambada, "wikitext": _wikitext, "multiple_choice": _multiple_choice}


def share(rights: Sequence[bool]) -> dict[str, float]:
    """Return a proportion with its Wilson interval over the items."""
    from scipy.stats import binomtest

    found = binomtest(sum(rights), len(rights)).proportion_ci(1 - LEVEL, method="wilson")
    return {"value": sum(rights) / len(rights), "low": float(found.low), "high": float(found.high)}


def perplexity(nats: Sequence[float], sizes: Sequence[int]) -> dict[str, float]:
    """Return exp(nats per unit of size), capped at e**700, which is near the largest float."""
    return {end: math.exp(min(value, 700)) for end, value in mean_interval(nats, sizes).items()}


def mean_interval(values: Sequence[float], sizes: Sequence[int]) -> dict[str, float]:
    """Return sum of values / sum of sizes with a percentile bootstrap interval over items (zero width for one item)."""
    from scipy.stats import bootstrap

    data = np.asarray(values, float), np.asarray(sizes, float)
    value = float(data[0].sum() / data[1].sum())
    if len(values) < 2:
        return {"value": value, "low": value, "high": value}
    found = bootstrap(
        data,
        lambda v, s, axis: v.sum(axis) / s.sum(axis),
        n_resamples=DRAWS,
        batch=100,  # each resample has one float per item
        paired=True,
        confidence_level=1 - LEVEL,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return {"value": value, "low": float(found.low), "high": float(found.high)}
