"""Speed of attention with narrow values on a CPU: blocked kernel against torch's fused kernel with padded values.

    python benchmarks/attention.py [--threads 1 2] [--repeats 5]

Each kernel gets its inputs in the memory layout it prefers: time innermost for the blocked kernel, head dim innermost for the
fused one. Runs alternate; times are medians of wall time for a forward and a backward pass, so nothing else should be running.
`x` is the speedup of the blocked kernel.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from bench import command_line, medians, timed
from torch import Tensor

from stacklm.console import table
from stacklm.model.kernels.attention import blocked_attention, fused_attention
from stacklm.train.device import setup_device

SHAPES = {
    "laptop, first stack": (16, 128, 64, 32, 8),
    "laptop, second stack": (16, 128, 64, 32, 16),
    "laptop, long": (4, 512, 64, 32, 8),
    "seed-2x64, first stack": (1, 512, 512, 64, 8),
    "seed-4x8": (1, 512, 64, 128, 32),
    "default": (16, 256, 32, 24, 8),
}
"""Rows, tokens, total heads of all layers, key dim, features."""


def time_innermost(rows: int, tokens: int, heads: int, dim: int) -> Tensor:
    return torch.randn(heads, dim, rows, tokens).permute(2, 3, 0, 1).requires_grad_()


def dim_innermost(rows: int, tokens: int, heads: int, dim: int) -> Tensor:
    return torch.randn(rows, tokens, heads, dim, requires_grad=True)


FORMS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "blocks": (blocked_attention, time_innermost),
    "fused": (fused_attention, dim_innermost),
}


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    rows = []
    for threads in options.threads:
        setup_device("cpu", threads)
        for name, shape in SHAPES.items():
            blocks, fused = (1000 * seconds for seconds in measure(shape, options.repeats))
            rows.append((name, f"{threads}", f"{blocks:.1f} ms", f"{fused:.1f} ms", f"{fused / blocks:.2f}"))
    print(table(("", "threads", "blocks", "fused", "x"), rows))


def measure(shape: tuple[int, int, int, int, int], repeats: int) -> list[float]:
    """Median seconds of each form, in the order of `FORMS`."""
    *sizes, key_dim, features = shape
    steps = []
    for attention, drawn in FORMS.values():
        parts = [drawn(*sizes, dim) for dim in (key_dim, key_dim, features)]
        steps.append(lambda attention=attention, parts=parts: attention(*parts).sum().backward())
    turns = [[timed(step).wall for step in steps] for _ in range(repeats + 1)]
    return medians(turns[1:])  # the first turn warms up


if __name__ == "__main__":
    main()
