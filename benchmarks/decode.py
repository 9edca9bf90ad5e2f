"""Decoding speed: milliseconds and cache bytes per token, by context length.

    python benchmarks/decode.py [--size laptop|seed-2x64|seed-4x8] [--contexts 128 512 2048] [--repeats 5] [--json FILE]

One new token of one sequence, for a stacked model and a dense one with about as many parameters, with each of these caches:

    keys and values   keys and values of every head
    stack inputs      only the stack inputs x_s (stacked models)
    recompute         no cache: a full forward pass

Runs of models and caches alternate; figures are medians. Weights are random. Logits are excluded: they cost the same in all cases.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from bench import LAPTOP, command_line, medians, parameters_of, table_of, timed
from torch import nn

from stacklm.config.model import Architecture, Dense
from stacklm.files import write_json
from stacklm.model.build import PRESETS, build
from stacklm.model.cache import INPUTS, KEYS_AND_VALUES, Decoder, Replacements

VOCAB = 2048
SIZES: dict[str, dict[str, Architecture]] = {
    "laptop": {
        "stacked 2 x 16, width 128": LAPTOP,
        "dense 10 layers, width 160": Dense(160, 4, 10, 640),
    },
    "seed-2x64": {
        "stacked 2 x 64, width 512": PRESETS["seed-2x64"].architecture,
        "dense 12 layers, width 1024": Dense(1024, 8, 12, 4096),
    },
    "seed-4x8": {
        "stacked 4 x 8, width 1024": PRESETS["seed-4x8"].architecture,
        "dense 14 layers, width 1024": Dense(1024, 8, 14, 4096),
    },
}
WAYS: dict[str, Replacements | None] = {"keys and values": KEYS_AND_VALUES, "stack inputs": INPUTS, "recompute": None}
COLUMNS = (
    ("model", "{model}"),
    ("way", "{way}"),
    ("parameters", "{parameters:,}"),
    ("context", "{context}"),
    ("ms/token", "{milliseconds:.2f}"),
    ("bytes/token", "{bytes_per_token:,}"),
    ("cache", "{megabytes:,.1f} MB"),
)


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--size", choices=SIZES, default="laptop")
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 512, 2048])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for context in options.contexts:
        for row in measure(SIZES[options.size], context, options.repeats, options.device):
            rows.append({"size": options.size, "device": options.device, "threads": options.threads, **row})
    print(table_of([{**row, "megabytes": row["bytes_per_token"] * row["context"] / 1e6} for row in rows], COLUMNS, left=2))
    if options.json:
        write_json(options.json, rows)


def measure(architectures: dict[str, Architecture], context: int, repeats: int, device: str) -> list[dict]:
    """The figures of all models for the last token of a context, for every kind of cache that works with each."""
    ids_1T = torch.randint(VOCAB, (1, context), device=device)
    rows: list[dict] = []
    steps: list[Callable[[], object]] = []
    for name, architecture in architectures.items():
        torch.manual_seed(0)
        model = build(architecture, VOCAB, context).to(device).eval()
        parameters = parameters_of(model)
        for way, replacements in WAYS.items():
            with suppress(ValueError):  # this kind of cache does not work with this model
                run, size = step(model, ids_1T, replacements)
                steps.append(run)
                rows.append({"model": name, "parameters": parameters, "way": way, "context": context, "bytes_per_token": size})
    seconds = medians([timed(run).wall for run in steps] for _ in range(repeats))
    return [{**row, "milliseconds": 1e3 * median} for row, median in zip(rows, seconds, strict=True)]


def step(model: nn.Module, ids_1T: torch.Tensor, replacements: Replacements | None) -> tuple[Callable[[], object], int]:
    """A function that computes the features of the last token, repeatably, and the bytes cached per token."""
    if replacements is None:
        return torch.no_grad()(lambda: model.features(ids_1T)[:, -1]), 0
    decoder = Decoder(model, ids_1T.shape[1], replacements)
    decoder.features(ids_1T[:, :-1])

    def again() -> torch.Tensor:
        decoder.cache.tokens = ids_1T.shape[1] - 1
        return decoder.features(ids_1T[:, -1:])

    return again, decoder.cache.bytes_per_token


if __name__ == "__main__":
    main()
