"""Settings that make a run smaller, and the search for those that make it fit."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from tqdm import tqdm

from stacklm.config.optimizer import Adafactor
from stacklm.config.params import Params
from stacklm.plan.memory import evaluation_memory, training_memory

SHORTEST_CONTEXT, SMALLEST_VOCABULARY = 32, 512

Read = Callable[[list[str]], Params]
"""The settings with further assignments."""


@dataclass(frozen=True)
class Lever:
    """One way to save memory.

    `options` are assignments for the models of those names, the mildest first, `peak` the bytes of the processes that they
    make smaller, and `price` what else they change.
    """

    options: Callable[[Params, list[str]], list[list[str]]]
    peak: Callable[[Params, list[str]], int]
    price: str


@dataclass(frozen=True)
class Move:
    """A lever that was pulled: what it sets, and the peak in bytes after it."""

    assignments: list[str]
    price: str
    peak: int


def micro_batches(params: Params, names: list[str]) -> list[list[str]]:
    train = params.train
    if in_backward(params):
        return []
    return [[f"train.micro_batch={rows}"] for rows in range(train.micro_batch - 1, 0, -1) if train.batch_size % rows == 0]


def evaluation_batches(params: Params, names: list[str]) -> list[list[str]]:
    return [[f"evaluate.batch_size={rows}"] for rows in halves(params.evaluate.batch_size, 1)]


def groups_of_layers(params: Params, names: list[str]) -> list[list[str]]:
    """Fewer of a stack's layers side by side; below an eighth of them little is left to save."""
    stacks = [stack for name in names for stack in getattr(params.models[name].architecture, "stacks", ())]
    most = max((stack.layers for stack in stacks), default=1)
    return [[f"train.layers_at_once={layers}"] for layers in halves(params.train.layers_at_once or most, max(1, most // 8))]


def recomputation(params: Params, names: list[str]) -> list[list[str]]:
    return [["train.recompute=stacks"]] if params.train.recompute == "nothing" else []


def precision(params: Params, names: list[str]) -> list[list[str]]:
    return [["train.precision=bf16"]] if params.train.precision == "fp32" else []


def factored_state(params: Params, names: list[str]) -> list[list[str]]:
    fat = [name for name in names if not isinstance(params.models[name].optimizer, Adafactor)]
    return [[f"models.{name}.optimizer={{kind: adafactor}}" for name in fat]] if fat else []


def contexts(params: Params, names: list[str]) -> list[list[str]]:
    """Shorter windows, and so many more of them that a step has the same tokens."""
    train = params.train
    if in_backward(params):
        return []  # a step of as many tokens is one pass of as many tokens
    return [
        [f"train.context={context}", f"train.batch_size={train.batch_size * (train.context // context)}"]
        for context in halves(train.context, SHORTEST_CONTEXT)
    ]


def vocabularies(params: Params, names: list[str]) -> list[list[str]]:
    return [[f"tokenizer.vocab_size={size}"] for size in halves(params.tokenizer.vocab_size, SMALLEST_VOCABULARY)]


def in_backward(params: Params) -> bool:
    """Whether a model is updated within the backward pass, for which a batch must be one pass."""
    return any(model.optimizer.in_backward for model in params.models.values())


def halves(value: int, least: int) -> list[int]:
    """The value halved again and again while it stays whole or large, down to at least `least`."""
    found = []
    while (value := value // 2) >= least:
        found.append(value)
    return found


def training(params: Params, names: list[str]) -> int:
    """Bytes of the largest process that trains one of those models."""
    vocab_size, train = params.tokenizer.vocab_size, params.train
    return max(training_memory(params.models[name], vocab_size, train).total for name in names)


def evaluation(params: Params, names: list[str]) -> int:
    """Bytes of the largest process that scores one of those models."""
    vocab_size, context, rows = params.tokenizer.vocab_size, params.train.context, params.evaluate.batch_size
    return max(evaluation_memory(params.models[name], vocab_size, context, rows).total for name in names)


def both(params: Params, names: list[str]) -> int:
    return max(training(params, names), evaluation(params, names))


LEVERS = (
    Lever(micro_batches, training, "the same training, in more passes"),
    Lever(evaluation_batches, evaluation, "the same scores, in more passes"),
    Lever(groups_of_layers, training, "the same training; the layers' forward pass runs twice"),
    Lever(recomputation, training, "the same training; the stacks' forward pass runs twice"),
    Lever(precision, training, "products rounded to bfloat16"),
    Lever(factored_state, training, "another optimizer, with a learning rate of its own to be tuned"),
    Lever(vocabularies, both, "another tokenizer, and more tokens for the same text"),
    Lever(contexts, both, "another task: shorter windows, as many tokens a step"),
)
"""From those that change no result to those that do."""


def fit(read: Read, names: list[str], budget: int, levers: Sequence[Lever] = LEVERS) -> list[Move]:
    """Pull one lever after the other, each no further than needed and none in vain, until the largest process fits `budget` bytes.

    The last move tells whether it does; no move means that nothing had to be, or could be, done.
    """
    moves: list[Move] = []
    chosen: list[str] = []
    with tqdm(desc="plan", unit=" estimates", mininterval=0.5, leave=False) as bar:

        def fits(option: list[str], lever: Lever) -> bool:
            bar.update()
            return lever.peak(read([*chosen, *option]), names) <= budget

        for lever in levers:
            options = lever.options(read(chosen), names)
            if options and not fits([], lever):
                first = bisect_left(options, True, key=partial(fits, lever=lever))
                pulled = options[min(first, len(options) - 1)]
                if lever.peak(read([*chosen, *pulled]), names) < lever.peak(read(chosen), names):
                    chosen.extend(pulled)
                    moves.append(Move(pulled, lever.price, both(read(chosen), names)))
    return moves
