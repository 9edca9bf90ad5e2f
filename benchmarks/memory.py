"""Measured peak memory on a CPU, and the linear fit with which `stacklm plan` estimates it from the size of the tensors.

    python benchmarks/memory.py [--only NAME ...] [--write]

Each configuration trains for a few steps in a separate process, forked from one that has imported everything and trained a tiny
model. The measured value is the peak memory of the process (VmHWM) minus its memory after steps of the tiny model. A line
through the tensors' peaks is fitted to every second configuration, by least squares of the relative errors of the total; the
others test it. `--write` writes the table to docs/measurements/memory.md; copy its constants to stacklm/plan/memory.py. Linux
only, because of VmHWM.
"""

from __future__ import annotations

import multiprocessing
import platform
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from bench import LAPTOP, command_line, train_steps

from stacklm.config.model import Architecture, Dense, FactoredAttention, Model, Stack, Stacked
from stacklm.config.optimizer import Adafactor, AdamW, Muon, Optimizer
from stacklm.config.train import Train
from stacklm.lab.speed import random_batches
from stacklm.plan.memory import fresh_run, training_memory
from stacklm.train.device import setup_device
from stacklm.train.metrics import peak_memory

STEPS = 4
TABLE = Path(__file__).resolve().parent.parent / "docs/measurements/memory.md"


@dataclass(frozen=True)
class Case:
    """A model and its batches: `passes` micro-batches of `rows` sequences per step."""

    architecture: Architecture
    vocab_size: int
    context: int
    rows: int
    passes: int = 1
    optimizer: Optimizer = field(default_factory=AdamW)
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def model(self) -> Model:
        return Model(self.architecture, self.optimizer)

    @property
    def train(self) -> Train:
        return Train(
            max_steps=100,
            context_length=self.context,
            global_batch_size=self.rows * self.passes,
            micro_batch_size=self.rows,
            device="cpu",
            threads=1,
            **self.settings,
        )


MODERN = {"ffn": "relu2", "residual": True, "skip_connections": "input", "conv_size": 4, "tie_embeddings": True}
ROTARY = FactoredAttention(qk_head_dim=32, rope=True, qk_norm=True)
SHARED = FactoredAttention(rope=True, kv_sharing="stack")
CHECKPOINTED = {"activation_checkpointing": "full"}
IN_BACKWARD = AdamW(optimizer_in_backward=True)
CASES = {
    "stacked 2 x 16, width 128": Case(LAPTOP, 512, 512, 4),
    "the same, long": Case(LAPTOP, 2048, 1024, 1),
    "the same, wide vocabulary": Case(LAPTOP, 16384, 256, 2, 2),
    "stacked 2 x 64, width 256": Case(Stacked(256, 4, (Stack(64, 4, 1024), Stack(64, 8, 1024))), 1024, 128, 4),
    "stacked 4 x 8, width 256": Case(Stacked(256, 4, (*(Stack(8, 32, 512),) * 3, Stack(8, 64, 1024))), 4096, 256, 2, 2),
    "stacked 2 x 8, width 512": Case(Stacked(512, 4, (Stack(8, 64, 512), Stack(8, 128, 1024))), 1024, 128, 2),
    "stacked, dropout": Case(Stacked(256, 8, (Stack(16, 16, 512), Stack(16, 32, 1024)), dropout=0.1), 2048, 256, 3),
    "stacked, modern": Case(Stacked(256, 4, (Stack(4, 64, 1024),) * 4, attention=ROTARY, **MODERN), 4096, 256, 3),
    "stacked, shared keys": Case(Stacked(256, 4, (Stack(8, 32, 768),) * 4, attention=SHARED, **MODERN), 2048, 512, 1, 2),
    "dense 6, width 256": Case(Dense(256, 8, 6, 1024), 1024, 512, 1, 2),
    "the same, one pass": Case(Dense(256, 8, 6, 1024), 4096, 512, 2),
    "dense 8, width 512": Case(Dense(512, 8, 8, 2048), 2048, 128, 2),
    "dense 8, width 384, SwiGLU, tied": Case(Dense(384, 6, 8, 1024, ffn="swiglu", tie_embeddings=True), 8192, 256, 2),
    "dense 16, width 192": Case(Dense(192, 6, 16, 768), 512, 256, 4),
    "dense 4, width 128, wide vocabulary": Case(Dense(128, 4, 4, 512), 32768, 128, 8),
    "params.yaml, stacked": Case(Stacked(96, 4, (Stack(8, 12, 384), Stack(8, 24, 768))), 2048, 128, 16),
    "params.yaml, dense": Case(Dense(128, 4, 5, 560), 2048, 128, 16),
    "dense 12, width 256, Adafactor": Case(Dense(256, 8, 12, 1024), 2048, 256, 2, optimizer=Adafactor()),
    "stacked 2 x 16, Adafactor": Case(LAPTOP, 8192, 256, 2, 2, optimizer=Adafactor()),
    "dense 4, width 256, Muon": Case(Dense(256, 8, 4, 1024), 2048, 256, 2, optimizer=Muon()),
    "stacked 2 x 8, Muon": Case(Stacked(128, 4, (Stack(8, 16, 512), Stack(8, 32, 512))), 2048, 256, 2, optimizer=Muon()),
    "dense 8, checkpointed": Case(Dense(384, 6, 8, 1536), 2048, 256, 3, settings=CHECKPOINTED),
    "stacked 4 x 8, checkpointed": Case(Stacked(256, 4, (Stack(8, 32, 512),) * 4), 2048, 256, 2, 2, settings=CHECKPOINTED),
    "dense 6, update in backward": Case(Dense(512, 8, 6, 2048), 4096, 128, 2, 1, IN_BACKWARD, {"max_grad_norm": None}),
    "dense 2, width 64": Case(Dense(64, 4, 2, 256), 512, 64, 8),
    "stacked 2 x 4, width 64": Case(Stacked(64, 4, (Stack(4, 16, 128), Stack(4, 16, 128))), 512, 256, 8),
}
TINY = Case(Dense(16, 2, 1, 16), 32, 8, 1, 2)


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--only", choices=CASES, nargs="+", default=list(CASES), metavar="NAME")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    setup_device("cpu", threads=1)
    steps(TINY)
    process = psutil.Process().memory_info().rss
    rows = []
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        for row in pool.imap(measure, options.only):
            rows.append(row)
            print(f"{row['name']}: {row['peak']:,}", flush=True)
    for row in rows:
        case = CASES[row["name"]]
        row["tensors"] = training_memory(case.model, case.vocab_size, case.train).tensors
    if len(rows) >= 4:
        text = report(rows, process)
        print("\n" + text)
        if options.write:
            TABLE.parent.mkdir(exist_ok=True)
            TABLE.write_text(text, encoding="utf-8")


def fitted(rows: list[dict[str, Any]], process: int) -> tuple[float, float]:
    """Overhead and bytes per byte of tensors, by least squares of the relative errors of the total, including imports."""
    tensors, peaks = (np.array([row[key] for row in rows], dtype=float) for key in ("tensors", "peak"))
    weights = 1 / (process + peaks)
    overhead, per_byte = np.linalg.lstsq(np.stack([weights, weights * tensors], axis=1), weights * peaks, rcond=None)[0]
    return float(overhead), float(per_byte)


def report(rows: list[dict[str, Any]], process: int) -> str:
    """The measurement as a Markdown page."""
    overhead, per_byte = fitted(rows[::2], process)
    estimates = [overhead + per_byte * row["tensors"] for row in rows]
    errors = [(process + estimate) / (process + row["peak"]) - 1 for row, estimate in zip(rows, estimates, strict=True)]
    ratios = [row["peak"] / estimate for row, estimate in zip(rows, estimates, strict=True)][1::2]
    lines = [
        "# Memory: measured and estimated",
        "",
        f"Written by `python benchmarks/memory.py --write`: {STEPS} training steps on a CPU, 1 thread, torch {torch.__version__},",
        f"{platform.system()} {platform.machine()}. MB above what the process holds",
        "after its imports; errors are those of the total with the imports.",
        "",
        f"- `OVERHEAD, PER_BYTE = {round(overhead, -5):_.0f}, {per_byte:.3f}`: fitted on {len(rows[::2])} configurations,",
        f"  on which it has a {_summary(errors[::2])}",
        f"- on the {len(ratios)} others: {_summary(errors[1::2])}",
        f"- `LOW, HIGH = {min(ratios):.2f}, {max(ratios):.2f}`: measured over estimated above the imports, on the others",
        f"- `PROCESS = {round(process, -6):_.0f}`: what the first process holds after its imports and the tiny model",
        "",
        "| configuration | vocabulary | context | batch | tensors | measured | estimated | error | used for |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for i, (row, estimate, error) in enumerate(zip(rows, estimates, errors, strict=True)):
        case = CASES[row["name"]]
        figures = " | ".join(f"{value / 1e6:.0f}" for value in (row["tensors"], row["peak"], estimate))
        about = f"{row['name']} | {case.vocab_size:,} | {case.context:,} | {case.passes} * {case.rows}"
        lines.append(f"| {about} | {figures} | {error:+.1%} | {'test' if i % 2 else 'fit'} |")
    return "\n".join(lines) + "\n"


def _summary(errors: list[float]) -> str:
    sizes = [abs(error) for error in errors]
    return f"worst error {max(sizes):.1%}, median {statistics.median(sizes):.1%}"


def measure(name: str) -> dict[str, Any]:
    """The peak memory of training that configuration, in bytes above the memory of this process after the tiny model."""
    steps(TINY)  # a fork maps the libraries' pages again when it uses them
    before = psutil.Process().memory_info().rss
    steps(CASES[name])
    return {"name": name, "peak": peak_memory() - before}


def steps(case: Case) -> None:
    run = fresh_run(case.model, case.vocab_size, case.train, random_batches(case.train, case.vocab_size, STEPS))
    train_steps(run, STEPS)


if __name__ == "__main__":
    main()
