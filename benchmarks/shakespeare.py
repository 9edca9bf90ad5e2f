"""nanoGPT's CPU recipe: character-level tiny Shakespeare, 2,000 steps of 12 sequences of 64 characters.

    python benchmarks/shakespeare.py FILE [--models dense stacked] [--rates 2e-3 4e-3 8e-3] [--steps 2000] [--seed 1] [--json FILE]

A dense decoder, 4 layers of width 128, and a stacked one with as many parameters in the body, each trained with every learning
rate by the unchanged trainer. The first nine tenths of the file are for training; the loss is that of all the rest, in nats per
character, in adjacent sequences of 64. Published for this recipe, with a GPT of that size: 1.88 (nanoGPT's README).
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from bench import command_line, stream_of, table_of, timed

from stacklm.config.model import Architecture, Dense, FactoredAttention, Model, Stack, Stacked
from stacklm.config.optimizer import AdamW
from stacklm.config.train import Train
from stacklm.data.batches import TrainBatches, evaluation_batches
from stacklm.data.shards import TokenStream
from stacklm.files import read_jsonl, write_json
from stacklm.model.count import count
from stacklm.train.device import setup_device
from stacklm.train.metrics import METRICS
from stacklm.train.trainer import Run, train
from stacklm.train.validate import validate

CONTEXT, BATCH = 64, 12
MODELS: dict[str, Architecture] = {
    "dense": Dense(d_model=128, n_heads=4, n_layers=4, d_ff=512),
    "stacked": Stacked(
        d_model=128,
        n_heads=4,
        stacks=(Stack(2, 64, 384),) * 3,
        attention=FactoredAttention(qk_head_dim=32, rope=True, qk_norm=True),
        ffn="relu2",
        residual=True,
        skip_connections="input",
        conv_size=4,
    ),
}
COLUMNS = (
    ("model", "{model}"),
    ("body", "{body:,}"),
    ("parameters", "{parameters:,}"),
    ("MFLOP/token", "{megaflops:.2f}"),
    ("rate", "{rate:g}"),
    ("loss", "{loss:.4f}"),
    ("minutes", "{minutes:.1f}"),
)


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--models", choices=MODELS, nargs="+", default=list(MODELS))
    parser.add_argument("--rates", type=float, nargs="+", default=[2e-3, 4e-3, 8e-3])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = setup_device("cpu", options.threads)
    vocab_size, train_stream, valid_stream = streams(options.file.read_text(encoding="utf-8"))
    config = Train(
        max_steps=options.steps,
        context_length=CONTEXT,
        global_batch_size=BATCH,
        micro_batch_size=BATCH,
        seed=options.seed,
        warmup_steps=max(1, options.steps // 20),
        eval_every=options.steps,
        eval_tokens=len(valid_stream),
        checkpoint_every=options.steps,
    )
    rows, shown = [], []
    for name in options.models:
        counts = count(MODELS[name], vocab_size, CONTEXT)
        body = counts.parameters["matrix"] + counts.parameters["vector"]
        for rate in options.rates:
            found = timed(partial(trained, MODELS[name], config, rate, vocab_size, train_stream, valid_stream, device))
            row = {"model": name, "body": body, "parameters": counts.total, "flops": counts.training_flops_per_token}
            rows.append({**row, "rate": rate, "loss": found.result})
            shown.append({**rows[-1], "megaflops": row["flops"] / 1e6, "minutes": found.wall / 60})
    print(table_of(shown, COLUMNS))
    if options.json:
        write_json(options.json, rows)


def trained(
    architecture: Architecture,
    config: Train,
    rate: float,
    vocab_size: int,
    train_stream: TokenStream,
    valid_stream: TokenStream,
    device: torch.device,
) -> float:
    """Nats per character of the whole validation stream, after training with that peak learning rate."""
    sizes_V = np.array([0] + [1] * (vocab_size - 1))
    with tempfile.TemporaryDirectory() as work:
        run = Run(
            f"{architecture.kind} at {rate:g}",
            config,
            Model(architecture, AdamW(peak_lr=rate)),
            vocab_size,
            batches=TrainBatches(train_stream, CONTEXT, BATCH, config.seed),
            validate=lambda network: validate(network, valid_stream, sizes_V, CONTEXT, 64, config.eval_tokens),
            probe_BT=next(evaluation_batches(valid_stream, CONTEXT, BATCH))[0],
            identity={},
            work=Path(work),
            device=device,
        )
        train(run)
        return read_jsonl(run.work / METRICS)[-1]["valid_loss"]


def streams(text: str) -> tuple[int, TokenStream, TokenStream]:
    """The vocabulary size (the end token 0, and one token per character), and streams of the first nine tenths and the rest."""
    characters = sorted(set(text))
    id_of = {character: number for number, character in enumerate(characters, start=1)}
    ids = np.array([id_of[character] for character in text], dtype=np.uint16)
    cut = len(ids) * 9 // 10
    return len(characters) + 1, stream_of(ids[:cut]), stream_of(ids[cut:])


if __name__ == "__main__":
    main()
