"""Estimates of a run before it starts, and the search for settings that need less memory."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch

from stacklm.config.model import Dense, Model, Stacked
from stacklm.config.optimizer import Adafactor
from stacklm.config.params import Params
from stacklm.config.schema import ParamsError, listed, nearest, plain
from stacklm.model.build import PRESETS, ModelConfig, build
from stacklm.model.cache import INPUTS, KEYS_AND_VALUES, Decoder, Replacements
from stacklm.model.count import Counts, count
from stacklm.plan.memory import Memory, evaluation_memory, tracing, training_memory
from stacklm.progress import progress

BYTES_PER_TOKEN = 4
"""Rough bytes of text per token, used until a tokenizer has been trained."""
SHORTEST_CONTEXT, SMALLEST_VOCABULARY = 32, 512


@dataclass(frozen=True)
class ModelPlan:
    """The estimates for one model. `flops` are those of the whole run.

    Caches are in bytes per token of one sequence; None if that kind of cache cannot be used, or for a model from outside this
    package, whose depth is unknown too.
    """

    depth: int | None
    counts: Counts
    flops: int
    cache: int | None
    input_cache: int | None
    training: Memory
    evaluation: Memory

    @property
    def checkpoint(self) -> int:
        """Bytes of a checkpoint on disk: weights and optimizer state."""
        return self.weights + self.training.parts["optimizer state"]

    @property
    def weights(self) -> int:
        """Bytes of the trained model on disk."""
        return self.training.parts["weights"]


@dataclass(frozen=True)
class Corpus:
    """Tokens in the train split and in all splits: `counted` in the shards, or estimated from the maximum bytes to read."""

    train_tokens: int
    tokens: int
    counted: bool


@dataclass(frozen=True)
class Plan:
    """The plan of a run. `corpus` is None if the size of the text is not limited and not yet known."""

    params: Params
    models: dict[str, ModelPlan]
    corpus: Corpus | None

    @property
    def largest(self) -> Memory:
        """The memory of the largest process."""
        processes = (memory for model in self.models.values() for memory in (model.training, model.evaluation))
        return max(processes, key=lambda memory: memory.total)

    @property
    def tokens(self) -> int:
        return self.params.train.max_steps * self.params.train.tokens_per_step

    @property
    def shards(self) -> int | None:
        """Bytes of the token files on disk."""
        size = 2 if self.params.tokenizer.vocab_size <= 2**16 else 4
        return self.corpus and self.corpus.tokens * size


def plan(params: Params, names: list[str], manifest: Mapping[str, Any] | None) -> Plan:
    """Return the plan of the named models. `manifest` is that of the shards, if they exist."""
    bar = progress(names, desc="plan", unit="model", leave=False)
    return Plan(params, {name: model_plan(params, name) for name in bar}, corpus(params, manifest))


def model_plan(params: Params, name: str) -> ModelPlan:
    model, vocab_size, train = params.models[name], params.tokenizer.vocab_size, params.train
    config = ModelConfig(model.architecture, vocab_size, train.context_length)
    counts = count(model.architecture, vocab_size, train.context_length)
    return ModelPlan(
        depth=model.architecture.depth(train.context_length),
        counts=counts,
        flops=train.max_steps * train.tokens_per_step * counts.training_flops_per_token,
        cache=cache_bytes(config, KEYS_AND_VALUES),
        input_cache=cache_bytes(config, INPUTS),
        training=training_memory(model, vocab_size, train),
        evaluation=evaluation_memory(model, vocab_size, train.context_length, params.evaluate.batch_size),
    )


def cache_bytes(config: ModelConfig, replacements: Replacements) -> int | None:
    """Return the cache size of decoding in bytes per token; None if those replacements do not support the model, or if it is
    unknown."""
    if not isinstance(config.architecture, (Stacked, Dense)):
        return None
    with tracing(config.vocab_size):
        network = build(config.architecture, config.vocab_size, config.context_length).eval()
        try:
            decoder = Decoder(network, 1, replacements)
        except ValueError:
            return None
        decoder.features(torch.zeros(1, 1, dtype=torch.long))
        return decoder.cache.bytes_per_token


def corpus(params: Params, manifest: Mapping[str, Any] | None) -> Corpus | None:
    """Return the size of the corpus, counted if shards with this vocabulary exist."""
    if manifest and manifest["vocab_size"] == params.tokenizer.vocab_size:
        tokens = {split: figures["tokens"] for split, figures in manifest["splits"].items()}
        return Corpus(tokens["train"], sum(tokens.values()), counted=True)
    if params.data.source.max_bytes is None:
        return None
    tokens = params.data.source.max_bytes // BYTES_PER_TOKEN
    held_out = params.data.valid_fraction + params.data.test_fraction
    return Corpus(round(tokens * (1 - held_out)), tokens, counted=False)


def assignments_of(name: str) -> list[str]:
    """Return the assignments that add a preset to the settings. Raises `ParamsError` for an unknown name."""
    if name not in PRESETS:
        raise ParamsError(f"no preset {name!r}; the presets are {listed(PRESETS)}{nearest(name, PRESETS)}")
    config = PRESETS[name]
    return [
        f"models.{name}={json.dumps(plain(Model(config.architecture)))}",
        f"tokenizer.vocab_size={config.vocab_size}",
        f"train.context_length={config.context_length}",
    ]


class MemoryOption(NamedTuple):
    """One way to save memory: candidate assignments, the mildest first, the peak of the processes affected, and the cost."""

    candidates: list[list[str]]
    peak: Callable[[Params, list[str]], int]
    cost: str


class Change(NamedTuple):
    """A chosen option: its assignments, its cost, and the peak in bytes after it."""

    assignments: list[str]
    cost: str
    peak: int


def memory_options(params: Params, names: list[str]) -> dict[str, MemoryOption]:
    """Return the options that save memory for the named models, by the key that they set, those that change no result first.

    A model that is updated within the backward pass needs its batch in one pass, so smaller micro-batches are not offered.
    """
    train, vocab_size = params.train, params.tokenizer.vocab_size
    rows, contexts = range(train.micro_batch_size - 1, 0, -1), _halves(train.context_length, SHORTEST_CONTEXT)
    if any(model.optimizer.optimizer_in_backward for model in params.models.values()):
        rows, contexts = range(0), []
    micro_batches = [[f"train.micro_batch_size={n}"] for n in rows if train.global_batch_size % n == 0]
    batch_sizes = [[f"evaluate.batch_size={n}"] for n in _halves(params.evaluate.batch_size, 1)]
    checkpointed = [["train.activation_checkpointing=full"]] if train.activation_checkpointing == "none" else []
    rounded = [["train.precision=bf16"]] if train.precision == "fp32" else []
    others = [name for name in names if not isinstance(params.models[name].optimizer, Adafactor)]
    factored = [[f"models.{name}.optimizer={{kind: adafactor}}" for name in others]] if others else []
    vocabularies = [[f"tokenizer.vocab_size={n}"] for n in _halves(vocab_size, SMALLEST_VOCABULARY)]
    shorter = [
        [f"train.context_length={n}", f"train.global_batch_size={train.global_batch_size * (train.context_length // n)}"]
        for n in contexts
    ]
    return {
        "micro_batch_size": MemoryOption(micro_batches, _training, "same training, in more passes"),
        "batch_size": MemoryOption(batch_sizes, _evaluation, "same scores, in more passes"),
        "activation_checkpointing": MemoryOption(checkpointed, _training, "same training; the forward pass runs twice"),
        "precision": MemoryOption(rounded, _training, "matrix products in bfloat16"),
        "optimizer": MemoryOption(factored, _training, "different optimizer; its learning rate must be tuned"),
        "vocab_size": MemoryOption(vocabularies, _largest, "different tokenizer; more tokens for the same text"),
        "context_length": MemoryOption(shorter, _largest, "different task: shorter sequences; same tokens per step"),
    }


def fit(read: Callable[[list[str]], Params], names: list[str], budget: int) -> list[Change]:
    """Choose options in order until the largest process fits, each only as far as needed, skipping those that save nothing.

    `read` returns the settings with further assignments; `budget` is in bytes. The peak of the last change shows whether it fits;
    no changes mean that none was needed, or none was possible.
    """
    changes: list[Change] = []
    chosen: list[str] = []
    with progress(desc="plan", unit=" estimates", leave=False) as bar:

        def fits(assignments: list[str], option: MemoryOption) -> bool:
            bar.update()
            return option.peak(read([*chosen, *assignments]), names) <= budget

        for key in memory_options(read([]), names):
            option = memory_options(read(chosen), names)[key]
            candidates = option.candidates
            if candidates and not fits([], option):
                first = bisect_left(candidates, True, key=partial(fits, option=option))
                best = candidates[min(first, len(candidates) - 1)]
                if option.peak(read([*chosen, *best]), names) < option.peak(read(chosen), names):
                    chosen.extend(best)
                    changes.append(Change(best, option.cost, _largest(read(chosen), names)))
    return changes


def _halves(value: int, least: int) -> list[int]:
    """Return the value divided by 2, 4, 8, ..., rounded down, while it is at least `least`."""
    found = []
    while (value := value // 2) >= least:
        found.append(value)
    return found


def _training(params: Params, names: list[str]) -> int:
    """Return the bytes of the largest process that trains one of the models."""
    vocab_size, train = params.tokenizer.vocab_size, params.train
    return max(training_memory(params.models[name], vocab_size, train).total for name in names)


def _evaluation(params: Params, names: list[str]) -> int:
    """Return the bytes of the largest process that scores one of the models."""
    vocab_size, context, rows = params.tokenizer.vocab_size, params.train.context_length, params.evaluate.batch_size
    return max(evaluation_memory(params.models[name], vocab_size, context, rows).total for name in names)


def _largest(params: Params, names: list[str]) -> int:
    return max(_training(params, names), _evaluation(params, names))
