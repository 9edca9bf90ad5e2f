"""Every variant of the family trained for a moment on the bytes of one file: a direction, and no result.

    python benchmarks/variants.py FILE [--steps 300] [--rates 2e-3 6e-3] [--seed 1] [--json FILE]

Small models, one seed, few steps. Each is trained at every learning rate and shown at its best. Below them stands a grid: the
modern form at equal parameters, from many parallel layers to one, a dense decoder. The last tenth of the file is for
validation. `cache` is what decoding keeps of a token, in numbers.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from stacklm.config.model import Stack, Stacked
from stacklm.config.optimizer import AdamW
from stacklm.config.train import Train
from stacklm.data.batches import TrainBatches
from stacklm.data.shards import TokenStream
from stacklm.files import write_json
from stacklm.model.build import ModelConfig, build
from stacklm.model.cache import KEYS_AND_VALUES
from stacklm.model.count import count
from stacklm.model.variants import grid, variants
from stacklm.plan.plan import cache_bytes
from stacklm.train.loss import Objective
from stacklm.train.optimizer import build_optimizer, lr_factor, set_lr
from stacklm.train.validate import validate

VOCAB, CONTEXT = 257, 64  # the end token and the 256 bytes
BASE = Stacked(d_model=48, n_heads=4, stacks=(Stack(4, 12, 96), Stack(4, 12, 96), Stack(4, 24, 192)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rates", type=float, nargs="+", default=[2e-3, 6e-3])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    train, valid = streams(options.file.read_bytes())
    config = Train(
        options.steps, CONTEXT, global_batch_size=8, micro_batch_size=8, seed=options.seed, warmup_steps=options.steps // 10
    )
    rows = []
    print(f"{'model':<18}{'S x N':>8}{'parameters':>12}{'forward FLOPs':>15}{'cache':>7}{'bits/byte':>11}{'at rate':>9}")
    for name, architecture in models().items():
        scores = {rate: trained(architecture, config, rate, train, valid) for rate in options.rates}
        best = min(scores, key=scores.get)
        row = {"model": name, **facts(architecture), "bits_per_byte": scores[best], "rate": best, "scores": scores}
        rows.append(row)
        shape = f"{row['depth']} x {row['layers']}"
        print(
            f"{name:<18}{shape:>8}{row['parameters']:>12,}{row['forward_flops_per_token']:>15,}{row['cache']:>7,}"
            f"{row['bits_per_byte']:>11.3f}{best:>9g}",
            flush=True,
        )
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
    torch.manual_seed(config.seed)
    model = build(architecture, VOCAB, CONTEXT)
    optimizer = build_optimizer(model, AdamW(peak_lr=rate))
    batches = TrainBatches(train, CONTEXT, config.global_batch_size, config.seed)
    for step in range(1, config.max_steps + 1):
        set_lr(optimizer, lr_factor(step, config))
        optimizer.zero_grad()
        (Objective(model)(*batches.batch(step - 1)) / config.tokens_per_step).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
    sizes_V = np.array([0] + [1] * 256)
    return validate(model, valid, sizes_V, CONTEXT, batch_size=32, tokens=config.eval_tokens).bits_per_byte


def streams(text: bytes) -> tuple[TokenStream, TokenStream]:
    """The first nine tenths of the bytes, and the rest; byte b is token b + 1."""
    ids = np.frombuffer(text, np.uint8).astype(np.uint16) + 1
    cut = len(ids) * 9 // 10
    return tuple(TokenStream([part], 0, 1, len(part), 0) for part in (ids[:cut], ids[cut:]))


if __name__ == "__main__":
    main()
