"""The figures of a run that has not begun."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from stacklm.config.model import Model
from stacklm.config.params import Params
from stacklm.config.schema import ParamsError, listed, nearest, plain
from stacklm.model.build import ModelConfig, build
from stacklm.model.cache import INPUTS, KEYS_AND_VALUES, Decoder, Leaves
from stacklm.model.count import Counts, count
from stacklm.model.presets import PRESETS
from stacklm.plan.memory import Memory, evaluation_memory, training_memory

BYTES_PER_TOKEN = 4
"""Of text, roughly, where no tokenizer has been trained yet."""


@dataclass(frozen=True)
class ModelPlan:
    """What one model consists of and takes. `flops` are those of the whole run.

    Caches are bytes a token of one sequence; None where the kind cannot be used.
    """

    depth: int
    counts: Counts
    flops: int
    cache: int | None
    input_cache: int | None
    training: Memory
    evaluation: Memory

    @property
    def checkpoint(self) -> int:
        """Bytes on disk: the weights and the optimizer's state."""
        return self.weights + self.training.parts["optimizer state"]

    @property
    def weights(self) -> int:
        """Bytes on disk of the trained model."""
        return self.training.parts["weights"]


@dataclass(frozen=True)
class Corpus:
    """Tokens to train on and in all splits; `counted` in shards, and else guessed from the bytes that may be read."""

    train_tokens: int
    tokens: int
    counted: bool


@dataclass(frozen=True)
class Plan:
    """`corpus` is None where nothing bounds the text before it is read."""

    params: Params
    models: dict[str, ModelPlan]
    corpus: Corpus | None

    @property
    def peak(self) -> int:
        """Bytes of the largest process."""
        return max(max(model.training.total, model.evaluation.total) for model in self.models.values())

    @property
    def tokens(self) -> int:
        return self.params.train.steps * self.params.train.tokens_per_step

    @property
    def shards(self) -> int | None:
        """Bytes on disk of the token files."""
        size = 2 if self.params.tokenizer.vocab_size <= 2**16 else 4
        return self.corpus and self.corpus.tokens * size


def plan(params: Params, names: list[str], manifest: Mapping[str, Any] | None) -> Plan:
    """The plan of those models. `manifest` is that of the shards, if they have been made."""
    bar = tqdm(names, desc="plan", unit="model", mininterval=0.5, leave=False)
    return Plan(params, {name: model_plan(params, name) for name in bar}, corpus(params, manifest))


def model_plan(params: Params, name: str) -> ModelPlan:
    model, vocab_size, train = params.models[name], params.tokenizer.vocab_size, params.train
    config = ModelConfig(model.architecture, vocab_size, train.context)
    counts = count(model.architecture, vocab_size, train.context)
    return ModelPlan(
        depth=model.architecture.depth(train.context),
        counts=counts,
        flops=train.steps * train.tokens_per_step * counts.training_flops_per_token,
        cache=cache_bytes(config, KEYS_AND_VALUES),
        input_cache=cache_bytes(config, INPUTS),
        training=training_memory(model, vocab_size, train),
        evaluation=evaluation_memory(model, vocab_size, train.context, params.evaluate.batch_size),
    )


def cache_bytes(config: ModelConfig, leaves: Leaves) -> int | None:
    """Bytes that decoding keeps of a token; None for a model that what those leaves keep does not suffice."""
    with torch.device("meta"):
        network = build(config.architecture, config.vocab_size, config.context).eval()
        try:
            decoder = Decoder(network, 1, leaves)
        except ValueError:
            return None
        decoder.features(torch.zeros(1, 1, dtype=torch.long))
    return decoder.cache.bytes_per_token


def corpus(params: Params, manifest: Mapping[str, Any] | None) -> Corpus | None:
    """What there is to train on, counted where shards of this vocabulary are there."""
    if manifest and manifest["vocab_size"] == params.tokenizer.vocab_size:
        tokens = {split: figures["tokens"] for split, figures in manifest["splits"].items()}
        return Corpus(tokens["train"], sum(tokens.values()), counted=True)
    if params.data.source.max_bytes is None:
        return None
    tokens = params.data.source.max_bytes // BYTES_PER_TOKEN
    held_out = params.data.valid_fraction + params.data.test_fraction
    return Corpus(round(tokens * (1 - held_out)), tokens, counted=False)


def assignments_of(name: str) -> list[str]:
    """The assignments that put a preset into the settings. Raises `ParamsError` for a name that is none."""
    if name not in PRESETS:
        raise ParamsError(f"no preset {name!r}; the presets are {listed(PRESETS)}{nearest(name, PRESETS)}")
    config = PRESETS[name]
    return [
        f"models.{name}={json.dumps(plain(Model(config.architecture)))}",
        f"tokenizer.vocab_size={config.vocab_size}",
        f"train.context={config.context}",
    ]
