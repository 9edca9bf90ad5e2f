"""A model built for real, and steps of training by the trainer's own `train_step`: seconds, loss and the most memory held.

    python benchmarks/presets.py seed-2x64|seed-4x8|PARAMS_FILE [--steps 1] [--threads 2] [--device cpu] [--json FILE]

A preset trains on one window at the published vocabulary of 110,000 and context of 2,048, in float32 with AdamW; of a params
file the first model trains by its settings. Tokens are random, and the loss of an untrained model is close to ln V, that of a
uniform guess. On a GPU `--memory 8e9` lets torch take no more than so many bytes.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch

from stacklm.config.model import Model
from stacklm.config.params import load
from stacklm.config.train import Train
from stacklm.data.batches import TrainBatches
from stacklm.data.shards import TokenStream
from stacklm.files import write_json
from stacklm.model.build import PRESETS
from stacklm.model.count import count
from stacklm.train.device import setup_device
from stacklm.train.metrics import peak_memory
from stacklm.train.trainer import Run, train_step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", help="a preset or a params file")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--memory", type=float, help="bytes that torch may take of a GPU")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = setup_device(options.device, options.threads)
    if options.memory:
        torch.cuda.set_per_process_memory_fraction(options.memory / torch.cuda.get_device_properties(device).total_memory)
    found = measure(*settings(options.what, options.threads), device, options.steps)
    print(
        f"{options.what}: {found['parameters']:,} parameters built, {found['counted']:,} counted\n"
        f"loss {found['loss']:.4f}, ln V {found['uniform']:.4f}, gradient norm {found['grad_norm']:.3g}\n"
        f"{found['build_seconds']:.1f} s to build, {found['step_seconds']:.1f} s a step, threads: {options.threads} "
        f"({found['cpu_seconds']:.1f} s of CPU time)\n"
        f"{found['peak'] / 1e9:.2f} GB held at most"
    )
    if options.json:
        write_json(options.json, {"what": options.what, "device": options.device, "threads": options.threads, **found})


def settings(what: str, threads: int) -> tuple[Train, Model, int]:
    """How to train which model, and its vocabulary."""
    if what in PRESETS:
        config = PRESETS[what]
        train = Train(max_steps=100, context_length=config.context_length, global_batch_size=1, micro_batch_size=1, threads=threads)
        return train, Model(config.architecture), config.vocab_size
    params = load(Path(what))
    return params.train, next(iter(params.models.values())), params.tokenizer.vocab_size


def measure(config: Train, model: Model, vocab_size: int, device: torch.device, steps: int) -> dict[str, float]:
    """Build the model and train it for some steps on random tokens."""
    length = steps * config.tokens_per_step
    tokens = np.random.default_rng(0).integers(vocab_size, size=length, dtype=np.uint32)
    stream = TokenStream([tokens], end_id=0, documents=1, bytes=len(tokens), words=1)
    begin = time.perf_counter()
    run = Run(
        "presets",
        config,
        model,
        vocab_size,
        batches=TrainBatches(stream, config.context_length, config.global_batch_size, seed=0),
        validate=lambda network: None,
        probe_BT=torch.zeros(1, 1, dtype=torch.long),
        identity={},
        work=Path(),
        device=device,
    )
    start, cpu = time.perf_counter(), time.process_time()
    taken = [train_step(run, step) for step in range(1, steps + 1)]
    loss, norm = taken[0].loss.item(), taken[0].norm.item()
    end = time.perf_counter()
    return {
        "parameters": sum(parameter.numel() for parameter in run.model.parameters()),
        "counted": count(model.architecture, vocab_size, config.context_length).total,
        "loss": loss,
        "uniform": math.log(vocab_size),
        "grad_norm": norm,
        "build_seconds": start - begin,
        "step_seconds": (end - start) / steps,
        "cpu_seconds": (time.process_time() - cpu) / steps,
        "peak": torch.cuda.max_memory_allocated() if device.type == "cuda" else peak_memory(),
    }


if __name__ == "__main__":
    main()
