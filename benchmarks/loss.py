"""Time and memory of the loss, forward and backward: with all logits, in stacklm's chunks, and with torch's chunked loss.

    python benchmarks/loss.py [--repeats 3] [--threads 2] [--json FILE]

All forms use the same features and head, alternate, and run in a new process for each repeat. Time is CPU time over all
threads, because other work on the machine hardly affects it; memory is the peak of the process above its features and head,
including gradients (Linux only). Figures are medians over the repeats.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import psutil
import torch
import torch.nn.functional as F
from bench import command_line, table_of, timed
from torch import Tensor, nn

from stacklm.files import write_json
from stacklm.model.layers import Head
from stacklm.train.device import setup_device
from stacklm.train.loss import Objective
from stacklm.train.metrics import peak_memory

SIZES = {"large": (4096, 512, 110_000), "small": (4096, 384, 2048)}
"""Tokens, width of the features, vocabulary."""
COLUMNS = (
    ("form", "{form}"),
    ("CPU time", "{seconds:.2f} s"),
    ("ratio", "{time_ratio:.2f}"),
    ("memory", "{megabytes:.0f} MB"),
    ("ratio", "{memory_ratio:.3f}"),
    ("loss", "{loss:.6f}"),
)


class Features(nn.Module):
    """A model of constant features and a head."""

    def __init__(self, tokens: int, width: int, vocab_size: int) -> None:
        super().__init__()
        self.x_RC = nn.Parameter(torch.empty(tokens, width).normal_())
        self.head = Head(width, vocab_size, bias=True)

    def features(self, ids_BT: Tensor) -> Tensor:
        return self.x_RC[None]


def plain(model: Features, targets_BT: Tensor) -> Tensor:
    return F.cross_entropy(model.head(model.x_RC), targets_BT[0], reduction="sum")


def ours(model: Features, targets_BT: Tensor) -> Tensor:
    return Objective(model)(targets_BT, targets_BT)


def torchs(model: Features, targets_BT: Tensor, **options: object) -> Tensor:
    chosen = torch.nn.LinearCrossEntropyOptions(**options)
    head, bias = model.head.weight, model.head.bias
    return F.linear_cross_entropy(model.x_RC, head, targets_BT[0], linear_bias=bias, reduction="sum", options=chosen)


FORMS: dict[str, Callable[[Features, Tensor], Tensor]] = {"plain": plain, "ours": ours}
if hasattr(F, "linear_cross_entropy"):
    FORMS["torch's, as it chooses"] = torchs
    FORMS["torch's, 256 rows"] = partial(torchs, batch_chunk_size=256, chunking_method=None)


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = [row for size in SIZES for row in compare(size, options.repeats, options.threads)]
    if options.json:
        write_json(options.json, {"torch": torch.__version__, "threads": options.threads, "rows": rows})


def compare(size: str, repeats: int, threads: int) -> list[dict]:
    """The figures of all forms at one size; ratios are relative to the plain form."""
    found: dict[str, list[dict]] = {form: [] for form in FORMS}
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for _ in range(repeats):
            for form, results in found.items():
                results.append(pool.apply(measure, (SIZES[size], form, threads)))
    rows = [
        {"size": size, "form": form, **{name: median(result[name] for result in results) for name in results[0]}}
        for form, results in found.items()
    ]
    print("{} tokens, {} wide, {} words".format(*(f"{number:,}" for number in SIZES[size])))
    for row in rows:
        row["time_ratio"], row["memory_ratio"] = (row[name] / rows[0][name] for name in ("seconds", "bytes"))
    print(table_of([{**row, "megabytes": row["bytes"] / 1e6} for row in rows], COLUMNS), end="\n\n", flush=True)
    return rows


def measure(size: tuple[int, int, int], form: str, threads: int) -> dict[str, float]:
    """CPU seconds of the second loss with its gradients, peak bytes above features and head, and the mean loss."""
    setup_device("cpu", threads)
    torch.manual_seed(0)
    loss = FORMS[form]
    step(Features(8, 8, 8), torch.zeros(1, 8, dtype=torch.long), loss)  # exclude what torch loads in its first step
    model = Features(*size)
    targets_BT = torch.randint(size[2], (1, size[0]))
    held = psutil.Process().memory_info().rss
    step(model, targets_BT, loss)
    second = timed(lambda: step(model, targets_BT, loss))
    return {"seconds": second.cpu, "bytes": peak_memory() - held, "loss": second.result}


def step(model: Features, targets_BT: Tensor, form: Callable[[Features, Tensor], Tensor]) -> float:
    model.zero_grad()
    loss = form(model, targets_BT)
    (loss / targets_BT.numel()).backward()
    return loss.item() / targets_BT.numel()


if __name__ == "__main__":
    main()
