"""Made-up outputs of training and evaluation for tests, in the real formats and with realistic curves."""

from __future__ import annotations

import math
from pathlib import Path

from stacklm.config.model import Dense, Model, Stack, Stacked
from stacklm.config.optimizer import AdamW
from stacklm.config.schema import plain
from stacklm.config.train import Train
from stacklm.files import write_json, write_jsonl
from stacklm.model.build import ModelConfig
from stacklm.report.runs import Result, load_results

TRAIN = Train(max_steps=300, context_length=128, global_batch_size=16, micro_batch_size=16, eval_every=50)
MODELS = {
    "stacked": Model(Stacked(64, 4, (Stack(8, 8, 256), Stack(8, 16, 512))), AdamW(peak_lr=2e-3)),
    "dense": Model(Dense(128, 4, 4, 512), AdamW(peak_lr=2e-3)),
}
MANIFEST = {
    "version": 1,
    "dtype": "uint16",
    "vocab_size": 2048,
    "end_id": 0,
    "tokenizer": "5f" * 32,
    "splits": {
        "train": {"tokens": 2_034_112, "documents": 412, "bytes": 7_204_113, "words": 801_340, "shards": []},
        "valid": {"tokens": 112_903, "documents": 22, "bytes": 398_211, "words": 44_102, "shards": []},
        "test": {"tokens": 110_420, "documents": 21, "bytes": 391_870, "words": 43_507, "shards": []},
    },
}
SAMPLE = 'parse(self, text):\n    if text < 0 and text > "<b>":\n        return """ & so on\n'


class Folders:
    """The folders that `compare` reads, for the models in `floors`, which gives their final losses.

    `noise` for a model and seed is added to the loss.
    """

    def __init__(self, root: Path, floors: dict[str, float], noise: dict[tuple[str, int], float] | None = None):
        self.trained, self.evaluations, self.shards, self.timing = (root / n for n in ("models", "evaluations", "shards", "timing"))
        write_json(self.shards / "manifest.json", MANIFEST)
        noise = noise or dict.fromkeys(((name, 1) for name in floors), 0.0)
        self.seeds = sorted({seed for _, seed in noise})
        for i, (name, floor) in enumerate(floors.items()):
            for seed in self.seeds:
                self.write_model(name, MODELS[name], floor + noise[name, seed], seconds=92.4 + 31.7 * i, seed=seed)

    def write_model(self, name: str, model: Model, floor: float, seconds: float, seed: int = 1) -> None:
        name = f"{name}-{seed}"
        config = ModelConfig(model.architecture, MANIFEST["vocab_size"], TRAIN.context_length)
        write_json(self.trained / name / "config.json", {**plain(config), "sha256": name})
        metrics = [_metrics(step, floor) for step in range(TRAIN.max_steps + 1)]
        write_jsonl(self.trained / name / "metrics.jsonl", metrics)
        times = [_timing(step, seconds) for step in range(10, TRAIN.max_steps + 1, 10)]
        write_jsonl(self.timing / f"{name}.jsonl", [*times[:-1], {**times[-1], "model_sha256": name}])
        evaluation = {split: _score(MANIFEST["splits"][split], floor + extra) for split, extra in (("valid", 0.02), ("test", 0.05))}
        write_json(self.evaluations / f"{name}.json", {**evaluation, "sample": {"prompt": "def ", "text": SAMPLE}})

    def results(self, models: dict[str, Model] = MODELS, config: Train = TRAIN) -> list[Result]:
        return load_results(models, self.seeds, config, MANIFEST, self.trained, self.evaluations, self.timing)


def _metrics(step: int, floor: float) -> dict:
    loss = floor + (math.log(2048) - floor) * math.exp(-((step / 40) ** 0.6))
    row = {"step": step, "tokens": step * TRAIN.tokens_per_step, "flops": step * TRAIN.tokens_per_step * 3_200_000}
    if step:
        row |= {"train_loss": loss + 0.08 * math.sin(7.3 * step * floor), "lr": 2e-3, "grad_norm": 0.7}
    if step % TRAIN.eval_every == 0:
        row |= {"valid_loss": loss + 0.02, "valid_bits_per_byte": (loss + 0.02) * 0.4}
    return row


def _timing(step: int, seconds: float) -> dict:
    return {
        "step": step,
        "seconds": seconds * step / TRAIN.max_steps,
        "tokens_per_second": 6_600.0,
        "process_rss_bytes": 700_000_000,
        "peak_memory_bytes": 700_000_000 + 1_000_000 * step,
        "cpu_percent": 180.0,
        "system_memory_bytes": 3_000_000_000,
        "system_memory_percent": 40.0,
    }


def _score(sizes: dict, loss: float) -> dict:
    nats = loss * sizes["tokens"]
    return {
        **{unit: sizes[unit] for unit in ("tokens", "bytes", "words")},
        "loss": loss,
        "bits_per_byte": nats / math.log(2) / sizes["bytes"],
        "word_perplexity": math.exp(nats / sizes["words"]),
    }
