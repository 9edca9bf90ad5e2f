"""Every variant of the family trained for a moment on the bytes of one file: a direction, and no result.

    python benchmarks/variants.py FILE [--steps 300] [--rates 2e-3 6e-3] [--seed 1] [--json FILE]

Small models, one seed, few steps. Each is trained at every learning rate and shown at its best. Below them stands a grid: the
modern form at equal parameters, from many parallel layers to one, a dense decoder. The last tenth of the file is for
validation. `cache` is what decoding keeps of a token, in numbers.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from bench import command_line, nine_tenths, table_of, train_steps

from stacklm.config.model import Model, Stack, Stacked
from stacklm.config.optimizer import AdamW
from stacklm.config.train import Train
from stacklm.data.batches import TrainBatches
from stacklm.data.shards import TokenStream
from stacklm.files import write_json
from stacklm.model.build import ModelConfig
from stacklm.model.cache import KEYS_AND_VALUES
from stacklm.model.count import count
from stacklm.model.variants import grid, variants
from stacklm.plan.memory import fresh_run
from stacklm.plan.plan import cache_bytes
from stacklm.progress import progress
from stacklm.train.validate import validate

VOCAB, CONTEXT = 257, 64  # the end token and the 256 bytes
BASE = Stacked(d_model=48, n_heads=4, stacks=(Stack(4, 12, 96), Stack(4, 12, 96), Stack(4, 24, 192)))
COLUMNS = (
    ("model", "{model}"),
    ("S x N", "{depth} x {layers}"),
    ("parameters", "{parameters:,}"),
    ("forward FLOPs", "{forward_flops_per_token:,}"),
    ("cache", "{cache:,}"),
    ("bits/byte", "{bits_per_byte:.3f}"),
    ("at rate", "{rate:g}"),
)


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rates", type=float, nargs="+", default=[2e-3, 6e-3])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    # Byte b is token b + 1.
    train, valid = nine_tenths(np.frombuffer(options.file.read_bytes(), np.uint8).astype(np.uint16) + 1)
    config = Train(
        options.steps, CONTEXT, global_batch_size=8, micro_batch_size=8, seed=options.seed, warmup_steps=options.steps // 10
    )
    rows = []
    for name, architecture in progress(models().items(), desc="variants", unit="model"):
        scores = {rate: trained(architecture, config, rate, train, valid) for rate in options.rates}
        best = min(scores, key=scores.get)
        rows.append({"model": name, **facts(architecture), "bits_per_byte": scores[best], "rate": best, "scores": scores})
    print(table_of(rows, COLUMNS))
    if options.json:
        write_json(options.json, rows)


def models() -> dict[str, Stacked]:
    """The variants, and the grid of the modern one, named by its shape."""
    found = variants(BASE, CONTEXT)
    traded = [member.architecture for member in grid(found["modern"], VOCAB, CONTEXT)]
    return found | {f"modern, N = {a.stacks[0].layers}": a for a in traded if a.stacks[0].layers <= 16}


def facts(architecture: Stacked) -> dict[str, int]:
    counts = count(architecture, VOCAB, CONTEXT)
    return {
        "depth": architecture.depth(CONTEXT),
        "layers": architecture.stacks[0].layers,
        "parameters": counts.total,
        "forward_flops_per_token": counts.forward_flops_per_token,
        "cache": (cache_bytes(ModelConfig(architecture, VOCAB, CONTEXT), KEYS_AND_VALUES) or 0) // torch.float32.itemsize,
    }


def trained(architecture: Stacked, config: Train, rate: float, train: TokenStream, valid: TokenStream) -> float:
    """Bits per byte on the validation stream after training at that peak learning rate."""
    batches = TrainBatches(train, CONTEXT, config.global_batch_size, config.seed)
    run = fresh_run(Model(architecture, AdamW(peak_lr=rate)), VOCAB, config, batches)
    train_steps(run, config.max_steps)
    sizes_V = np.array([0] + [1] * 256)
    return validate(run.model, valid, sizes_V, CONTEXT, batch_size=32, tokens=config.eval_tokens).bits_per_byte


if __name__ == "__main__":
    main()
