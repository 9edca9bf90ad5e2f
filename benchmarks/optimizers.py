"""Cost of optimizers: time of an update relative to fused AdamW, and bytes per parameter.

    python benchmarks/optimizers.py [--size laptop|seed-2x64|seed-4x8] [--repeats 5] [--threads 2] [--json FILE]

Updates of all optimizers alternate on the same random gradients; a time is the median of its ratios to AdamW's in the same round,
and `lowest` and `highest` are the extremes. Unlike a forward and backward pass, an update does not depend on the batch.

Bytes come from the memory trace of `stacklm plan`: the optimizer's state, and the peak of a training step on a few tokens, so
that activations are negligible, with the update after the backward pass and within it. The vocabulary is small when times are
measured (embedding and head take little time) and the preset's own for bytes.
"""

from __future__ import annotations

import statistics
from pathlib import Path

import torch
from bench import LAPTOP, command_line, parameters_of, table_of, timed
from torch import nn

from stacklm.config.model import Architecture
from stacklm.config.optimizer import Adafactor, AdamW, Muon, Optimizer
from stacklm.files import write_json
from stacklm.model.build import PRESETS, build
from stacklm.plan.memory import tracing
from stacklm.train.device import setup_device
from stacklm.train.loss import Objective
from stacklm.train.optimizer import InBackward, build_optimizer

KINDS: dict[str, Optimizer] = {"adamw": AdamW(), "muon": Muon(), "adafactor": Adafactor()}
SMALL_VOCAB, TOKENS = 512, 16
SIZES = {"laptop": (LAPTOP, 2048), **{name: (preset.architecture, preset.vocab_size) for name, preset in PRESETS.items()}}
COLUMNS = (
    ("", "{kind}"),
    ("median", "{ratio:.2f}x"),
    ("lowest", "{lowest:.2f}x"),
    ("highest", "{highest:.2f}x"),
    ("state", "{state:.2f}"),
    ("peak", "{peak:.2f}"),
    ("in backward", "{peak_in_backward:.2f}"),
)


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--size", choices=SIZES, default="laptop")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = setup_device(options.device, options.threads)
    architecture, vocab_size = SIZES[options.size]
    times = update_times(architecture, options.repeats, device)
    rows, shown = [], []
    for kind, settings in KINDS.items():
        ratios = [own / reference for own, reference in zip(times[kind], times["adamw"], strict=True)]
        row = {"size": options.size, "kind": kind, "seconds": times[kind], "ratio": statistics.median(ratios)}
        row |= bytes_a_parameter(architecture, vocab_size, settings)
        rows.append(row)
        shown.append({**row, "lowest": min(ratios), "highest": max(ratios)})
    print(f"time of an update, and bytes a parameter\n{table_of(shown, COLUMNS)}")
    if options.json:
        write_json(options.json, rows)


def update_times(architecture: Architecture, repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of `repeats` updates by each optimizer, which alternate."""
    torch.manual_seed(0)
    model = build(architecture, SMALL_VOCAB, TOKENS).to(device)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizers = {kind: build_optimizer(model, settings) for kind, settings in KINDS.items()}
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for turn in range(1 + repeats):  # the first allocates the state
        for kind, optimizer in optimizers.items():
            seconds = timed(optimizer.step).wall
            if turn:
                times[kind].append(seconds)
    return times


def bytes_a_parameter(architecture: Architecture, vocab_size: int, settings: Optimizer) -> dict[str, float]:
    """Bytes per parameter of the state, and at the peaks of steps with the update after and within the backward pass."""
    state, peak = traced(architecture, vocab_size, settings, in_backward=False)
    _, within = traced(architecture, vocab_size, settings, in_backward=True)
    return {"state": state, "peak": peak, "peak_in_backward": within}


def traced(architecture: Architecture, vocab_size: int, settings: Optimizer, in_backward: bool) -> tuple[float, float]:
    """Bytes per parameter of the state, and at the peak of two steps."""
    with tracing(vocab_size) as timeline:
        model = build(architecture, vocab_size, TOKENS)
        timeline.follow(model)
        optimizer = build_optimizer(model, settings)
        if in_backward:
            InBackward(optimizer, model)
        for _ in range(2):
            step(model, optimizer, in_backward)
        state = sum(tensor.nbytes for tensors in optimizer.state.values() for tensor in tensors.values())
    parameters = parameters_of(model)
    return state / parameters, timeline.memory().tensors / parameters


def step(model: nn.Module, optimizer: torch.optim.Optimizer, in_backward: bool) -> None:
    ids_BT = torch.zeros(1, TOKENS, dtype=torch.long)
    model.zero_grad()
    Objective(model)(ids_BT, ids_BT).backward()
    if not in_backward:
        optimizer.step()


if __name__ == "__main__":
    main()
