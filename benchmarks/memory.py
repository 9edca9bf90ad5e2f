"""Estimated and measured peaks of memory, on a CPU.

    python benchmarks/memory.py [--only NAME ...] [--json FILE]

Each configuration trains for a few steps in a process of its own. Measured is the most memory that the process ever held
(VmHWM), minus what it held after all imports and a step of a tiny model; estimated is what `stacklm plan` says, without the
process itself. Linux only, as the first is.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch

from stacklm.config.model import Architecture, Dense, FoldedAttention, Model, Stack, Stacked
from stacklm.config.train import Train
from stacklm.data.batches import TrainBatches
from stacklm.data.shards import TokenStream
from stacklm.files import write_json
from stacklm.plan.memory import COMPONENTS, PROCESS, training_memory
from stacklm.train.assemble import assemble
from stacklm.train.machine import prepare
from stacklm.train.metrics import peak_memory
from stacklm.train.trainer import update

STEPS = 4


@dataclass(frozen=True)
class Case:
    """A model and its batches: `passes` micro-batches of `rows` windows a step."""

    architecture: Architecture
    vocab_size: int
    context: int
    rows: int
    passes: int = 1

    @property
    def train(self) -> Train:
        return Train(
            steps=100, context=self.context, batch_size=self.rows * self.passes, micro_batch=self.rows, device="cpu", threads=1
        )


MODERN = {"feed_forward": "relu2", "join": "residual", "reads": "first", "convolution": 4, "head": "tied"}
ROTARY = FoldedAttention(key_dim=32, rotary=True, qk_norm=True)
SHARED = FoldedAttention(rotary=True, keys_values="stack")
CASES = {
    "stacked 2 x 16, width 128": Case(Stacked(128, 4, (Stack(16, 8, 512), Stack(16, 16, 1024))), 512, 512, 8),
    "the same, long": Case(Stacked(128, 4, (Stack(16, 8, 512), Stack(16, 16, 1024))), 2048, 1024, 2),
    "the same, wide vocabulary": Case(Stacked(128, 4, (Stack(16, 8, 512), Stack(16, 16, 1024))), 16384, 256, 4, 2),
    "stacked 2 x 64, width 256": Case(Stacked(256, 4, (Stack(64, 4, 1024), Stack(64, 8, 1024))), 1024, 128, 4),
    "stacked 4 x 8, width 256": Case(Stacked(256, 4, (*(Stack(8, 32, 512),) * 3, Stack(8, 64, 1024))), 4096, 256, 4, 2),
    "stacked 2 x 8, width 512": Case(Stacked(512, 4, (Stack(8, 64, 512), Stack(8, 128, 1024))), 1024, 128, 2),
    "stacked, dropout": Case(Stacked(256, 8, (Stack(16, 16, 512), Stack(16, 32, 1024)), dropout=0.1), 2048, 256, 4),
    "stacked, modern": Case(Stacked(256, 4, (Stack(4, 64, 1024),) * 4, attention=ROTARY, **MODERN), 4096, 256, 8),
    "stacked, shared keys": Case(Stacked(256, 4, (Stack(8, 32, 768),) * 4, attention=SHARED, **MODERN), 2048, 512, 2, 2),
    "dense 6, width 256": Case(Dense(256, 8, 6, 1024), 1024, 512, 2, 2),
    "the same, one pass": Case(Dense(256, 8, 6, 1024), 4096, 512, 4),
    "dense 8, width 512": Case(Dense(512, 8, 8, 2048), 2048, 128, 2),
    "dense 8, width 384, SwiGLU, tied": Case(Dense(384, 6, 8, 1024, activation="swiglu", tied=True), 8192, 256, 4),
    "dense 16, width 192": Case(Dense(192, 6, 16, 768), 512, 256, 4, 2),
    "dense 4, width 128, wide vocabulary": Case(Dense(128, 4, 4, 512), 32768, 128, 8),
}
TINY = Case(Dense(16, 2, 1, 16), 32, 8, 1, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=CASES, nargs="+", default=list(CASES), metavar="NAME")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--measure", choices=CASES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(CASES[options.measure])))
        return
    rows = []
    print(f"{'configuration':<36}{'V':>7}{'T':>6}{'batch':>7}{'measured':>11}{'estimated':>11}{'error':>8}  largest parts")
    for name in options.only:
        rows.append(row(name, CASES[name]))
        print(line(rows[-1]), flush=True)
    worst = max(abs(row["error"]) for row in rows)
    bare = sum(row["process"] for row in rows) / len(rows)
    print(f"\nworst error {worst:.1%}; a process without tensors holds {bare / 1e6:.0f} MB (the plan says {PROCESS / 1e6:.0f} MB)")
    if options.json:
        write_json(options.json, rows)


def row(name: str, case: Case) -> dict:
    """Both figures of one configuration, in bytes."""
    command = [sys.executable, __file__, "--measure", name]
    measured = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    memory = training_memory(Model(case.architecture), case.vocab_size, case.train)
    estimated = memory.total - memory.parts["process"]
    return {"name": name, **measured, "estimated": estimated, "error": estimated / measured["peak"] - 1, "parts": memory.parts}


def line(row: dict) -> str:
    case = CASES[row["name"]]
    parts = sorted((part for part in COMPONENTS if part != "process"), key=row["parts"].get, reverse=True)[:3]
    largest = ", ".join(f"{part} {row['parts'][part] / 1e6:.0f}" for part in parts)
    batch = f"{case.passes} * {case.rows}"
    return (
        f"{row['name']:<36}{case.vocab_size:>7}{case.context:>6}{batch:>7}{row['peak'] / 1e6:>8.0f} MB"
        f"{row['estimated'] / 1e6:>8.0f} MB{row['error']:>8.1%}  {largest}"
    )


def measure(case: Case) -> dict[str, int]:
    """The peak of training, above what this process holds after the steps of a tiny model, and that."""
    prepare("cpu", threads=1)
    steps(TINY)
    process = psutil.Process().memory_info().rss
    steps(case)
    return {"peak": peak_memory() - process, "process": process}


def steps(case: Case) -> None:
    tokens = np.random.default_rng(0).integers(case.vocab_size, size=STEPS * case.train.tokens_per_step, dtype=np.uint16)
    stream = TokenStream([tokens], end_id=0, documents=1, bytes=len(tokens), words=1)
    run = assemble(
        "memory",
        case.train,
        Model(case.architecture),
        case.vocab_size,
        batches=TrainBatches(stream, case.context, case.train.batch_size, seed=0),
        validate=lambda network: None,
        probe_BT=torch.zeros(1, 1, dtype=torch.long),
        identity={},
        work=Path(),
        device=torch.device("cpu"),
    )
    for step in range(1, STEPS + 1):
        update(run, step)


if __name__ == "__main__":
    main()
