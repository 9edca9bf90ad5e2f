"""A project with text, tokenizer, shards and untrained models to evaluate."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from stacklm.config.data import FilesSource
from stacklm.config.evaluate import Evaluate, Sample
from stacklm.data.benchmarks import list_benchmarks
from stacklm.data.encode import write_shards
from stacklm.data.tokenizer import Tokenizer
from stacklm.evaluate.evaluate import evaluate
from stacklm.files import read_json
from stacklm.model.build import build
from stacklm.model.store import save_model
from support.corpus import prepare_tokenizer, write_texts
from support.train_files import MODELS, TRAIN

CONTEXT = 16
CONFIG = Evaluate(batch_size=4, sample=Sample(prompt="the", max_new_tokens=6), device="cpu", threads=1)


class Project:
    """Text, tokenizer and shards; `save` adds a model, `evaluate` evaluates it."""

    def __init__(self, root: Path) -> None:
        self.root, self.shards, self.vocab_size = root, root / "shards", 280
        write_texts(root / "text.jsonl", (f"paragraph {i}: the sum of {i} and {i * i} is é {i + i * i}" for i in range(120)))
        self.tokenizer = prepare_tokenizer(root, FilesSource(paths=("text.jsonl",)), self.vocab_size)
        write_shards(root / "documents", self.tokenizer, self.shards)
        self.digest = Tokenizer.load(self.tokenizer).digest

    def save(self, name: str, kind: str = "dense", uniform: bool = False, tokenizer: str | None = None) -> str:
        torch.manual_seed(4)
        architecture = MODELS[kind].architecture
        model = build(architecture, self.vocab_size, CONTEXT)
        if uniform:
            for parameter in model.head.parameters():
                nn.init.zeros_(parameter)
        save_model(self.root / name, model, architecture, self.vocab_size, CONTEXT, tokenizer or self.digest)
        return name

    def evaluate(self, name: str, config: Evaluate = CONFIG) -> dict:
        outputs = self.root / f"{name}.json", self.root / f"{name}-certificate.json"
        list_benchmarks(config.benchmarks, self.root / "benchmarks.json")
        inputs = self.root / name, self.shards, self.tokenizer, self.root / "benchmarks.json"
        evaluate(config, TRAIN, *inputs, *outputs)
        return read_json(self.root / f"{name}.json")
