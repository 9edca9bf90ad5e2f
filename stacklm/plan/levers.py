"""Settings that make a run smaller, and the search for those that make it fit."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass

from tqdm import tqdm

from stacklm.config.params import Params
from stacklm.plan.memory import evaluation_memory, training_memory

SHORTEST_CONTEXT, SMALLEST_VOCABULARY = 32, 512
NOTICEABLE = 0.02
"""A share of the peak; by less than that two estimates of the same may differ."""

Read = Callable[[list[str]], Params]
"""The settings with further assignments."""


@dataclass(frozen=True)
class Lever:
    """One way to save memory. `options` are assignments, the mildest first; `price` is what else they change."""

    price: str
    options: Callable[[Params], list[list[str]]]


@dataclass(frozen=True)
class Move:
    """A lever that was pulled: what it sets, and the peak in bytes after it."""

    assignments: list[str]
    price: str
    peak: int


def micro_batches(params: Params) -> list[list[str]]:
    train = params.train
    return [[f"train.micro_batch={rows}"] for rows in range(train.micro_batch - 1, 0, -1) if train.batch_size % rows == 0]


def evaluation_batches(params: Params) -> list[list[str]]:
    return [[f"evaluate.batch_size={rows}"] for rows in halves(params.evaluate.batch_size, 1)]


def contexts(params: Params) -> list[list[str]]:
    """Shorter windows, and so many more of them that a step has the same tokens."""
    train = params.train
    return [
        [f"train.context={context}", f"train.batch_size={train.batch_size * (train.context // context)}"]
        for context in halves(train.context, SHORTEST_CONTEXT)
    ]


def vocabularies(params: Params) -> list[list[str]]:
    return [[f"tokenizer.vocab_size={size}"] for size in halves(params.tokenizer.vocab_size, SMALLEST_VOCABULARY)]


def halves(value: int, least: int) -> list[int]:
    """The value halved again and again while it stays whole or large, down to at least `least`."""
    found = []
    while (value := value // 2) >= least:
        found.append(value)
    return found


LEVERS = (
    Lever("the same training, in more passes", micro_batches),
    Lever("the same scores, in more passes", evaluation_batches),
    Lever("another tokenizer, and more tokens for the same text", vocabularies),
    Lever("another task: shorter windows, as many tokens a step", contexts),
)
"""From those that change no result to those that do."""


def peak(params: Params, names: list[str]) -> int:
    """Bytes of the largest process: training or evaluating one of those models."""
    vocab_size, train = params.tokenizer.vocab_size, params.train
    models = [params.models[name] for name in names]
    return max(
        max(
            training_memory(model, vocab_size, train).total,
            evaluation_memory(model, vocab_size, train.context, params.evaluate.batch_size).total,
        )
        for model in models
    )


def fit(read: Read, names: list[str], budget: int) -> list[Move]:
    """Pull one lever after the other, each no further than needed, until the largest process fits `budget` bytes.

    The last move tells whether it does; no move means that nothing had to be, or could be, done. A lever that does not help
    is left where it was, and tried again after the next one.
    """
    moves: list[Move] = []
    chosen: list[str] = []
    left = list(LEVERS)
    with tqdm(desc="plan", unit="estimate", mininterval=0.5, leave=False) as bar:

        def peak_with(option: list[str]) -> int:
            bar.update()
            return peak(read([*chosen, *option]), names)

        reached = peak_with([])
        while reached > budget and (pulled := _pull(left, read(chosen), peak_with, reached, budget)):
            lever, option = pulled
            reached = peak_with(option)
            chosen += option
            moves.append(Move(option, lever.price, reached))
            left.remove(lever)
    return moves


def _pull(
    levers: list[Lever], params: Params, peak_with: Callable[[list[str]], int], reached: int, budget: int
) -> tuple[Lever, list[str]] | None:
    """The first lever that helps, and the mildest of its options that fits or, if none does, saves as much as the last."""
    for lever in levers:
        options = lever.options(params)
        if options and (lowest := peak_with(options[-1])) < (1 - NOTICEABLE) * reached:
            enough = max(budget, (1 + NOTICEABLE) * lowest)
            return lever, options[bisect_left(options, True, key=lambda option: peak_with(option) <= enough)]
    return None
