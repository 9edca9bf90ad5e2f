"""Build a large model and train it for a few steps with the trainer's `train_step`: seconds, loss and peak memory.

    python benchmarks/presets.py seed-2x64|seed-4x8|PARAMS_FILE [--steps 1] [--threads 2] [--device cpu] [--json FILE]

A preset trains on one sequence with the published vocabulary of 110,000 and context of 2,048, in float32 with AdamW; from a
params file the first model is trained with its settings. Tokens are random, and the loss of an untrained model is close to ln V,
that of a uniform distribution. On a GPU `--memory 8e9` limits the memory that torch may allocate.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from bench import command_line, parameters_of, timed, train_steps

from stacklm.config.model import Model
from stacklm.config.params import load
from stacklm.config.train import Train
from stacklm.files import write_json
from stacklm.lab.speed import random_batches
from stacklm.model.build import PRESETS
from stacklm.model.count import count
from stacklm.plan.memory import fresh_run
from stacklm.train.device import setup_device
from stacklm.train.metrics import peak_memory


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("what", help="a preset or a params file")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--memory", type=float, help="maximum bytes that torch may allocate on a GPU")
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
    """The training settings, the model and its vocabulary size."""
    if what in PRESETS:
        config = PRESETS[what]
        train = Train(max_steps=100, context_length=config.context_length, global_batch_size=1, micro_batch_size=1, threads=threads)
        return train, Model(config.architecture), config.vocab_size
    params = load(Path(what))
    return params.train, next(iter(params.models.values())), params.tokenizer.vocab_size


def measure(config: Train, model: Model, vocab_size: int, device: torch.device, steps: int) -> dict[str, float]:
    """Build the model and train it for `steps` steps on random tokens."""
    batches = random_batches(config, vocab_size, steps)
    built = timed(lambda: fresh_run(model, vocab_size, config, batches, device))
    run = built.result
    taken = timed(lambda: train_steps(run, steps))
    first = taken.result[0]
    return {
        "parameters": parameters_of(run.model),
        "counted": count(model.architecture, vocab_size, config.context_length).total,
        "loss": first.loss.item(),
        "uniform": math.log(vocab_size),
        "grad_norm": first.norm.item(),
        "build_seconds": built.wall,
        "step_seconds": taken.wall / steps,
        "cpu_seconds": taken.cpu / steps,
        "peak": torch.cuda.max_memory_allocated() if device.type == "cuda" else peak_memory(),
    }


if __name__ == "__main__":
    main()
