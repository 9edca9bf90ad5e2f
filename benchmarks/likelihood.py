"""Cost of scoring one sequence at a time, compared with batches of sequences of equal length, on BLiMP's minimal pairs.

    stacklm run-flow pretrain && python benchmarks/likelihood.py ../shared/data/blimp/blimp.jsonl.zst

Prints a row for each model trained with the first seed; times are CPU seconds of one thread.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from bench import Timed, timed

from stacklm.config.evaluate import Benchmark, Evaluate
from stacklm.console import table
from stacklm.data.benchmarks import read_items
from stacklm.evaluate.benchmarks import Scorer

BATCH = 32


def batched(scorer: Scorer, pairs: list[tuple[list[int], list[int]]]) -> list[float]:
    """The log-likelihood of each continuation, scored in batches of sequences of equal length."""
    found = [0.0] * len(pairs)
    by_length: dict[int, list[int]] = defaultdict(list)
    for i, (context, continuation) in enumerate(pairs):
        by_length[len(context) + len(continuation)].append(i)
    for places in by_length.values():
        for start in range(0, len(places), BATCH):
            chosen = places[start : start + BATCH]
            ids_BT = torch.tensor([[*pairs[i][0], *pairs[i][1]] for i in chosen])
            logs_BTV = scorer.model(ids_BT[:, :-1]).float().log_softmax(-1)
            totals_B = logs_BTV.gather(-1, ids_BT[:, 1:, None]).double().sum((1, 2))
            for i, total in zip(chosen, totals_B.tolist(), strict=True):
                found[i] = total
    return found


def after_a_first(score: Callable[[], list[float]]) -> Timed[list[float]]:
    score()
    return timed(score)


def main(file: str) -> None:
    items = read_items(Benchmark("blimp", file, limit=6))
    rows = []
    for folder in sorted(Path("out/models").glob("*-1")):
        scorer = Scorer.load(Evaluate(device="cpu", threads=1), folder, Path("out/tokenizer"))
        pairs = [scorer.encode(item.context, text) for item in items for text in item.continuations]
        with torch.inference_mode():
            alone = after_a_first(lambda: [scorer.loglikelihood(*pair)[0] for pair in pairs])  # noqa: B023
            together = after_a_first(lambda: batched(scorer, pairs))  # noqa: B023
        apart = [abs(a - b) for a, b in zip(alone.result, together.result, strict=True)]
        times = [f"{1000 * one.cpu / len(pairs):.2f}" for one in (alone, together)]
        differ = [f"{sum(map(bool, apart))} of {len(pairs)}", f"{max(apart):.1e}"]
        rows.append([folder.name, *times, f"{alone.cpu / together.cpu:.1f}", *differ])
    print(table(["model", "one at a time, ms", "in batches, ms", "ratio", "differ", "by at most, nats"], rows))


if __name__ == "__main__":
    main(*sys.argv[1:])
