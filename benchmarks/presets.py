"""A published model built for real, and one step of training: forward, backward and AdamW by the trainer's own `update`.

    python benchmarks/presets.py seed-2x64|seed-4x8 [--threads 2] [--device cpu] [--json FILE]

At the published vocabulary of 110,000 and context of 2,048, one window, in float32. The loss of an untrained model is close
to ln V, that of a uniform guess.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch

from stacklm.config.model import Model
from stacklm.config.train import Train
from stacklm.data.batches import TrainBatches
from stacklm.data.shards import TokenStream
from stacklm.files import write_json
from stacklm.model.build import ModelConfig
from stacklm.model.count import count
from stacklm.model.presets import PRESETS
from stacklm.train.assemble import assemble
from stacklm.train.machine import prepare
from stacklm.train.metrics import peak_memory
from stacklm.train.trainer import update


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", choices=PRESETS)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = measure(PRESETS[options.preset], prepare(options.device, options.threads))
    print(
        f"{options.preset}: {found['parameters']:,} parameters built, {found['counted']:,} counted\n"
        f"loss {found['loss']:.4f}, ln V {found['uniform']:.4f}, gradient norm {found['grad_norm']:.3g}\n"
        f"{found['build_seconds']:.1f} s to build, {found['step_seconds']:.1f} s for the step, threads: {options.threads} "
        f"({found['cpu_seconds']:.1f} s of CPU time)\n"
        f"{found['peak'] / 1e9:.2f} GB held at most"
    )
    if options.json:
        write_json(options.json, {"preset": options.preset, "device": options.device, "threads": options.threads, **found})


def measure(config: ModelConfig, device: torch.device) -> dict[str, float]:
    """Build the model and train it for one step on random tokens."""
    tokens = np.random.default_rng(0).integers(config.vocab_size, size=2 * config.context, dtype=np.uint32)
    stream = TokenStream([tokens], end_id=0, documents=1, bytes=len(tokens), words=1)
    begin = time.perf_counter()
    run = assemble(
        "presets",
        Train(steps=100, context=config.context, batch_size=1, micro_batch=1),
        Model(config.architecture),
        config.vocab_size,
        batches=TrainBatches(stream, config.context, batch_size=1, seed=0),
        validate=lambda network: None,
        probe_BT=torch.zeros(1, 1, dtype=torch.long),
        identity={},
        work=Path(),
        device=device,
    )
    start, cpu = time.perf_counter(), time.process_time()
    step = update(run, step=1)
    loss, norm = step.loss.item(), step.norm.item()
    end = time.perf_counter()
    return {
        "parameters": sum(parameter.numel() for parameter in run.model.parameters()),
        "counted": count(config.architecture, config.vocab_size, config.context).total,
        "loss": loss,
        "uniform": math.log(config.vocab_size),
        "grad_norm": norm,
        "build_seconds": start - begin,
        "step_seconds": end - start,
        "cpu_seconds": time.process_time() - cpu,
        "peak": torch.cuda.max_memory_allocated() if device.type == "cuda" else peak_memory(),
    }


if __name__ == "__main__":
    main()
