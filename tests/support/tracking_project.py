"""A small project with hand-written files in the real formats, as if stages had run; without training."""

from __future__ import annotations

import json
import math
import shutil
from functools import cache
from pathlib import Path

import pytest
import tokenizers
import torch
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from stacklm.code import digest
from stacklm.config.model import Dense, Model, Stack, Stacked
from stacklm.config.schema import plain
from stacklm.config.tokenizer import END_OF_TEXT
from stacklm.config.train import Train
from stacklm.data.tokenizer import PATTERNS
from stacklm.files import read_json, sha256, write_json, write_text
from stacklm.model.build import build
from stacklm.model.store import save_model
from stacklm.pipeline.project import Project
from stacklm.pipeline.stages import Instance, stage
from stacklm.pipeline.tracking.store import connect

TRAIN = Train(max_steps=20, context_length=8, global_batch_size=2, micro_batch_size=2, warmup_steps=2, eval_every=5)
MODELS = {
    "stacked": Model(Stacked(8, 2, (Stack(2, 4, 8), Stack(2, 8, 16)))),
    "dense": Model(Dense(8, 2, 1, 16)),
}
VOCAB = 257


def metrics(steps: int) -> list[dict]:
    """The metrics rows of steps 0 to `steps`, with a validation every 5."""
    rows = [{"step": s, "tokens": 16 * s, "flops": 1000 * s} for s in range(steps + 1)]
    for row in rows[1:]:
        row.update(train_loss=3.5 - 0.1 * row["step"], lr=1e-3, grad_norm=1.0)
    for row in rows[::5]:
        row.update(valid_loss=3.6 - 0.1 * row["step"], valid_bits_per_byte=2 - 0.05 * row["step"])
    return rows


def timing(steps: int) -> list[dict]:
    """The timing rows, half a second per step."""
    return [
        {
            "step": s,
            "seconds": 0.5 * s,
            "tokens_per_second": 32.0,
            "process_rss_bytes": 3e8,
            "peak_memory_bytes": 4e8,
            "cpu_percent": 99.0,
            "system_memory_bytes": 5e9,
            "system_memory_percent": 20.0,
        }
        for s in range(steps + 1)
    ]


def write_rows(path: Path, rows: list[dict]) -> None:
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def pretraining(model: str, seed: int = 1) -> Instance:
    return Instance(stage("pretrain"), model, seed)


def record(project: Project, model: str, seed: int = 1) -> dict:
    """The record that the stage runner would write for a pretraining."""
    record = {
        "stage": f"pretrain@{model}-{seed}",
        "params": {"train": {**plain(TRAIN), "seed": seed}, f"models.{model}": plain(MODELS[model])},
        "inputs": {"out/shards": sha256(project.root / "out/shards")},
        "code": "c0de" * 16,
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
    }
    return {"fingerprint": digest(record), **record}


@cache
def bytes_tokenizer() -> str:
    """A tokenizer.json with the end token and one token per byte."""
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERNS["gpt2"]), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator([], trainer)
    return bpe.to_str()


def prepare_data(project: Project) -> None:
    """Write the outputs of the stages before pretrain."""
    out = project.root / "out"
    write_text(out / "tokenizer" / "tokenizer.json", bytes_tokenizer())
    write_json(out / "tokenizer" / "token_bytes.json", [0] + [1] * 256)
    splits = {
        name: {"tokens": n, "documents": 4, "bytes": 2 * n, "words": n // 2}
        for name, n in (("train", 800), ("valid", 90), ("test", 80))
    }
    manifest = {
        "version": 1,
        "dtype": "uint16",
        "vocab_size": VOCAB,
        "end_id": 0,
        "tokenizer": sha256(out / "tokenizer"),
        "splits": splits,
    }
    write_json(out / "shards" / "manifest.json", manifest)
    data = {"source": {"kind": "stdlib", "max_bytes": 2000}, "valid_fraction": 0.1, "test_fraction": 0.1}
    write_json(out / "records" / "download.json", {"params": {"data": data}})
    write_json(
        out / "records" / "tokenizer.json", {"params": {"tokenizer": {"vocab_size": VOCAB, "special_tokens": ["<|endoftext|>"]}}}
    )


def publish_model(project: Project, model: str, weights: int = 1, seed: int = 1) -> None:
    """Write the outputs of pretrain, with random weights."""
    out, run = project.root / "out", f"{model}-{seed}"
    torch.manual_seed(weights)
    architecture = MODELS[model].architecture
    network, context = build(architecture, VOCAB, TRAIN.context_length), TRAIN.context_length
    save_model(out / "models" / run, network, architecture, VOCAB, context, sha256(out / "tokenizer"))
    write_rows(out / "models" / run / "metrics.jsonl", metrics(TRAIN.max_steps))
    *times, last = timing(TRAIN.max_steps)
    weights = read_json(out / "models" / run / "config.json")["sha256"]
    write_rows(out / "timing" / f"{run}.jsonl", [*times, {**last, "model_sha256": weights}])
    write_json(out / "records" / f"pretrain@{run}.json", record(project, model, seed))


def publish_evaluation(project: Project, model: str, loss: float = 1.5, seed: int = 1) -> None:
    """Write the outputs of evaluate."""
    out, run = project.root / "out", f"{model}-{seed}"
    split = {
        "tokens": 80,
        "bytes": 160,
        "words": 40,
        "loss": loss,
        "bits_per_byte": loss / 2 / math.log(2),
        "word_perplexity": 20.0,
    }
    write_json(
        out / "evaluations" / f"{run}.json",
        {
            "valid": split,
            "test": split,
            "benchmarks": {"blimp": {"scores": {"accuracy": {"value": loss / 3, "low": 0.1, "high": 0.9}}}},
            "sample": {"prompt": "def ", "text": "def f(): pass"},
        },
    )
    write_json(out / "records" / f"evaluate@{run}.json", {"inputs": {f"out/models/{run}": sha256(out / "models" / run)}})


def publish_report(project: Project, *models: str, best: str | None = None) -> None:
    """Write the outputs of compare for these models."""
    out = project.root / "out"
    write_text(out / "report" / "report.md", "# Comparison\n")
    facts = {model: {"seeds": {"1": {"test": 1.0}, "2": {"test": 1.1}}} for model in models}
    comparison = {"finding": "A finding.", "best": best, "models": facts, "provenance": {"seeds": [1], "alpha": 0.025}}
    write_json(out / "comparison.json", comparison)
    write_json(out / "records" / "compare.json", {"inputs": {"out/models": sha256(out / "models")}})


def make_project(root: Path, database: Path) -> Project:
    """A project that is ready to pretrain, tracked in a copy of an empty MLflow database."""
    project = Project(root, root / ".stacklm")
    project.state.mkdir(parents=True)
    shutil.copyfile(database, project.state / "mlflow.db")
    prepare_data(project)
    return project


def publish(project: Project, *models: str, best: str | None = None) -> Project:
    """The same after every stage has run."""
    for model in models:
        publish_model(project, model)
        publish_evaluation(project, model)
    publish_report(project, *models, best=best)
    return project


def client(project: Project):
    return connect(project)[0]


def runs(project: Project) -> list:
    """The training runs in the project's experiment."""
    return [run for run in all_runs(project) if "stacklm.fingerprint" in run.data.tags]


def all_runs(project: Project) -> list:
    """All runs in the project's experiment, including those of the pipeline."""
    tracker, experiment = connect(project)
    return list(tracker.search_runs([experiment]))


def logged_model(project: Project):
    """The only model logged in the project's experiment."""
    tracker, experiment = connect(project)
    (model,) = tracker.search_logged_models([experiment])
    return model


def curve(project: Project, key: str) -> list[tuple[int, float]]:
    """The points of the only run's curve, by step, including repeated ones."""
    (run,) = runs(project)
    return sorted((metric.step, metric.value) for metric in client(project).get_metric_history(run.info.run_id, key))


def isolate(patch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_HTTP_REQUEST_TIMEOUT", "MLFLOW_HTTP_REQUEST_MAX_RETRIES"):
        patch.delenv(name, raising=False)
