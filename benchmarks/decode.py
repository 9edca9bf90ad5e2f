"""Milliseconds and cache bytes per token against the number of tokens before it.

    python benchmarks/decode.py [--size laptop|seed-2x64|seed-4x8] [--contexts 128 512 2048] [--repeats 5] [--json FILE]

One new token of one sequence, for a stacked model and a dense one with about as many parameters, by each of:

    keys and values   of every head are kept
    stack inputs      x_s alone is kept (stacked)
    recompute         nothing is kept: a full forward

Models and ways take turns; figures are medians. Weights are random, and logits are not counted: they cost the same by every way.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from torch import nn

from stacklm.config.model import Architecture, Dense, Stack, Stacked
from stacklm.files import write_json
from stacklm.model.build import PRESETS, build
from stacklm.model.cache import INPUTS, KEYS_AND_VALUES, Decoder, Replacements

VOCAB = 2048
SIZES: dict[str, dict[str, Architecture]] = {
    "laptop": {
        "stacked 2 x 16, width 128": Stacked(128, 4, (Stack(16, 8, 512), Stack(16, 16, 1024))),
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="laptop")
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 512, 2048])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    print(f"{'model':<28}{'parameters':>12}  {'way':<16}{'context':>8}{'ms/token':>10}{'bytes/token':>13}{'cache':>11}")
    for context in options.contexts:
        for row in measure(SIZES[options.size], context, options.repeats, options.device):
            rows.append({"size": options.size, "device": options.device, "threads": options.threads, **row})
            print(
                f"{row['model']:<28}{row['parameters']:>12,}  {row['way']:<16}{context:>8}{row['milliseconds']:>10.2f}"
                f"{row['bytes_per_token']:>13,}{row['bytes_per_token'] * context / 1e6:>8,.1f} MB",
                flush=True,
            )
    if options.json:
        write_json(options.json, rows)


def measure(architectures: dict[str, Architecture], context: int, repeats: int, device: str) -> list[dict]:
    """The figures of all models for the last token of a context, by every way that is exact for each."""
    ids_1T = torch.randint(VOCAB, (1, context), device=device)
    rows: list[dict] = []
    steps: list[Callable[[], object]] = []
    for name, architecture in architectures.items():
        torch.manual_seed(0)
        model = build(architecture, VOCAB, context).to(device).eval()
        parameters = sum(parameter.numel() for parameter in model.parameters())
        for way, replacements in WAYS.items():
            with suppress(ValueError):  # where these replacements are not enough for this model
                run, size = step(model, ids_1T, replacements)
                steps.append(run)
                rows.append({"model": name, "parameters": parameters, "way": way, "context": context, "bytes_per_token": size})
    seconds = [[timed(run, device) for run in steps] for _ in range(repeats)]
    medians = [1e3 * statistics.median(times) for times in zip(*seconds, strict=True)]
    return [{**row, "milliseconds": median} for row, median in zip(rows, medians, strict=True)]


def step(model: nn.Module, ids_1T: torch.Tensor, replacements: Replacements | None) -> tuple[Callable[[], object], int]:
    """What makes the features of the last token, as often as asked, and the bytes it keeps of each token."""
    if replacements is None:
        return torch.no_grad()(lambda: model.features(ids_1T)[:, -1]), 0
    decoder = Decoder(model, ids_1T.shape[1], replacements)
    decoder.features(ids_1T[:, :-1])

    def again() -> torch.Tensor:
        decoder.cache.tokens = ids_1T.shape[1] - 1
        return decoder.features(ids_1T[:, -1:])

    return again, decoder.cache.bytes_per_token


def timed(run: Callable[[], object], device: str) -> float:
    """Seconds of one call, when all that was asked of the device is done."""
    begin = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
