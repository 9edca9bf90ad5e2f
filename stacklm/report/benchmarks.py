"""Benchmarks in the comparison: the scores of each model over its seeds, and published scores to compare with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

ENOUGH = 3
"""Seeds needed for a verdict or an interval over seeds. Benchmarks of one seed have an interval over items, of two seeds none."""


@dataclass(frozen=True)
class Published:
    """A published score of another model, with its training data."""

    kind: str
    score: str
    value: float
    model: str
    trained_on: str
    source: str


BABYLM = "baselines of BabyLM 2025 (babylm/evaluation-pipeline-2025)"
LM_EVAL = "EleutherAI/lm-evaluation-harness#2159, `lambada_openai`"
PUBLISHED = (
    Published("blimp", "accuracy", 0.673, "GPT-2 small", "10 M words, 10 epochs", BABYLM),
    Published("blimp", "accuracy", 0.717, "GPT-BERT 31 M, mostly causal", "10 M words, 10 epochs", BABYLM),
    Published("lambada", "accuracy", 0.326, "GPT-2 124 M", "WebText, 40 GB", LM_EVAL),
    Published("lambada", "perplexity", 40.1, "GPT-2 124 M", "WebText, 40 GB", LM_EVAL),
    Published("wikitext", "word_perplexity", 65.8, "AWD-LSTM 33 M", "WikiText-2, its words with <unk>", "arXiv:1708.02182"),
    Published("wikitext", "word_perplexity", 37.4, "GPT-2 124 M", "WebText, 40 GB", "huggingface/transformers#13761, lm-eval"),
)


def over_seeds(runs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return one model's benchmark scores by title, as means over the `benchmarks` of its evaluations, one per seed.

    `over` says what the intervals are over: `seeds` (t), the unit of the items, or None if there are no intervals.
    """
    found = {}
    for title, first in runs[0].items():
        figures = [run[title] for run in runs]
        scores = {name: _score([one["scores"][name] for one in figures]) for name in first["scores"]}
        over = "seeds" if len(runs) >= ENOUGH else first["unit"] if len(runs) == 1 else None
        sets = {name: fmean(one["sets"][name]["value"] for one in figures) for name in first.get("sets", {})}
        found[title] = {key: first.get(key) for key in ("kind", "items", "unit", "chance")} | {
            "over": over,
            "ties": fmean(one["ties"] for one in figures) if "ties" in first else None,
            "scores": scores,
            "sets": sets,
        }
    return found


def _score(seeds: Sequence[Mapping[str, float]]) -> dict[str, float | None]:
    if len(seeds) == 1:
        return dict(seeds[0])
    values = [one["value"] for one in seeds]
    if len(seeds) < ENOUGH:
        return {"value": fmean(values), "low": None, "high": None}
    from stacklm.lab.statistics import interval  # imports scipy, not needed to show a comparison

    low, high = interval(values)
    return {"value": fmean(values), "low": low, "high": high}
