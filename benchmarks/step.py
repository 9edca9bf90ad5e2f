"""One training step of the same model in five forms: seconds, FLOPs, memory.

    python benchmarks/step.py [--sizes laptop seed-2x64 ...] [--threads 2] [--repeats 5] [--seconds 20] [--json FILE]

    published   a Python loop over layers and heads, with explicit attention weights
    plain loop  a Python loop over layers, each an ordinary module with torch's `scaled_dot_product_attention`
    packed      all layers at once, with the same matrix products as the published form
    folded      all layers at once, with weights multiplied together first: what stacklm trains with
    checkpointed  the same with activation checkpointing: only the input of each stack is kept, the rest is recomputed

A step is a forward pass, the loss and a backward pass; the optimizer, which costs the same in all forms, is left out. Each form
runs in a separate process. Peak memory is that of the process, minus its memory after imports and a step of a tiny model (on a
GPU: peak allocated memory); `kept` is the same without weights and their gradients, which are equal in all forms. All forms start
from the same weights, and their logits and gradients are compared before timing. Then they alternate, each up to `--repeats`
times or until it has used up its `--seconds`; figures are medians. On a shared machine, use the CPU seconds, with one thread.

`floor` is the time that a form's FLOPs take at the rate of large matrix products, measured between the steps. `--json` writes a
file; sizes that it already contains are shown and not measured again. Linux only.
"""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import torch
import torch.nn.functional as F
from bench import LAPTOP, command_line, medians, table_of, timed
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula, sdpa_backward_flop_count, sdpa_flop_count

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from stacklm.config.model import Stack, Stacked
from stacklm.files import read_json, write_json
from stacklm.model.build import PRESETS, build
from stacklm.model.layers import Rotation
from stacklm.model.stacked import PublishedAttention
from stacklm.train.device import setup_device
from stacklm.train.metrics import peak_memory
from support.reference import DecoderLayer, ReferenceDecoder, unpack

VOCAB = 512
LOGITS, GRADIENTS = 1e-4, 1e-2
"""Tolerated relative errors. Rounding decides whether a ReLU is active near zero, and so a token's part of a gradient."""
SIDE = 2048
"""Size of the square matrices whose products give the machine's FLOP rate."""


@dataclass(frozen=True)
class Size:
    """A model and its batch: `rows` sequences of `context` tokens."""

    architecture: Stacked
    context: int
    rows: int


WIDE, DEEP = (replace(PRESETS[name].architecture, dropout=0) for name in ("seed-2x64", "seed-4x8"))
SIZES = {
    "laptop": Size(LAPTOP, context=128, rows=16),
    "laptop, long": Size(LAPTOP, context=512, rows=4),
    "seed-2x64": Size(WIDE, context=512, rows=1),
    "seed-2x64, long": Size(WIDE, context=2048, rows=1),
    "seed-4x8": Size(DEEP, context=512, rows=1),
    "tiny": Size(Stacked(16, 2, (Stack(4, 4, 16), Stack(4, 8, 32))), context=8, rows=2),
}


class PlainLayer(DecoderLayer):
    """A decoder layer in the usual form."""

    def attention(self, x_BTC: Tensor) -> Tensor:
        parts = (part(x_BTC).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.query, self.key, self.value))
        a_BHTK = F.scaled_dot_product_attention(*parts, is_causal=True)
        return self.output(a_BHTK.transpose(1, 2).flatten(2))


class Unfolded(PublishedAttention):
    """N layers at once, with the same matrix products as the published form."""

    def forward(self, x_BTC: Tensor, rotation: Rotation | None = None) -> Tensor:
        return self.unfolded(x_BTC)


def in_a_loop(layer: type[DecoderLayer], model: nn.Module, size: Size) -> nn.Module:
    """A model with the same weights that loops over layers."""
    with torch.device("meta"):
        twin = ReferenceDecoder(size.architecture, VOCAB, size.context, layer)
    twin.load_state_dict(unpack(model.state_dict()), assign=True)
    return twin


def packed(model: nn.Module, size: Size) -> nn.Module:
    for stack in model.stacks:
        folded = stack.attention
        with torch.device("meta"):
            unfolded = Unfolded(folded.layers, folded.width, folded.heads, folded.features, depth=1)
        unfolded.load_state_dict(folded.state_dict(), assign=True)
        stack.attention = unfolded
    return model


def folded(model: nn.Module, size: Size) -> nn.Module:
    return model


def checkpointed(model: nn.Module, size: Size) -> nn.Module:
    model.activation_checkpointing = True
    return model


FORMS: dict[str, Callable[[nn.Module, Size], nn.Module]] = {
    "published": partial(in_a_loop, DecoderLayer),
    "plain loop": partial(in_a_loop, PlainLayer),
    "packed": packed,
    "folded": folded,
    "checkpointed": checkpointed,
}
REFERENCE = "plain loop"
COLUMNS = (
    ("", "{form}"),
    ("wall", "{wall:.2f} s"),
    ("x", "{x[wall]:.2f}"),
    ("CPU", "{cpu:.2f} s"),
    ("x", "{x[cpu]:.2f}"),
    ("GFLOP", "{gflop:,.0f}"),
    ("x", "{x[operations]:.2f}"),
    ("floor", "{floor:.2f} s"),
    ("above", "{above:.2f}"),
    ("peak", "{peak_mb:,.0f} MB"),
    ("x", "{x[peak]:.2f}"),
    ("kept", "{kept_mb:,.0f} MB"),
    ("x", "{x[kept]:.2f}"),
)
MAPS = 3e9
"""Bytes of attention weights above which the published form is left out; it needs several times as much."""


@register_flop_formula(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu)
def _flops(q_BHTK, k_BHTK, v_BHTK, *_, out_shape=None, **__) -> int:
    """Counted as torch counts its kernels on a GPU."""
    return sdpa_flop_count(q_BHTK, k_BHTK, v_BHTK)


@register_flop_formula(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward)
def _flops_backward(grad_BHTK, q_BHTK, k_BHTK, v_BHTK, *_, out_shape=None, **__) -> int:
    return sdpa_backward_flop_count(grad_BHTK, q_BHTK, k_BHTK, v_BHTK)


@dataclass(frozen=True)
class Digest:
    """Results of a step for comparison: logits, and the norm and direction of each gradient."""

    logits: np.ndarray
    norms: np.ndarray
    directions: np.ndarray
    operations: int


class Bench:
    """Measures one form in this process."""

    def __init__(self, form: str, size: Size, threads: int, device: str) -> None:
        self.device = setup_device(device, threads)
        Step("folded", SIZES["tiny"], self.device).run()
        self.before = psutil.Process().memory_info().rss
        self.step = Step(form, size, self.device)

    def digest(self) -> Digest:
        """The first step, which is not timed."""
        return self.step.digest()

    def time(self) -> tuple[float, float]:
        """Wall and CPU seconds of a step."""
        return timed(self.step.run)[:2]

    def memory(self) -> dict[str, int]:
        """The peak memory so far above that at the start, and the part taken by weights and gradients."""
        peak = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else peak_memory() - self.before
        return {"peak": peak, "weights": 2 * sum(p.nbytes for p in self.step.model.parameters())}


class Rate:
    """Measures the machine's FLOP rate, in a separate process."""

    def __init__(self, threads: int, device: str) -> None:
        self.device = setup_device(device, threads)
        self.left, self.right = torch.randn(2, SIDE, SIDE, device=self.device)
        self.time()

    def time(self) -> tuple[float, float]:
        """Wall and CPU seconds per FLOP."""
        found = timed(lambda: self.left @ self.right)
        return found.wall / (2 * SIDE**3), found.cpu / (2 * SIDE**3)


class Step:
    """A training step of one form, identical each time."""

    def __init__(self, form: str, size: Size, device: torch.device) -> None:
        torch.manual_seed(0)
        model = build(size.architecture, VOCAB, size.context).to(device)
        self.ids_BT = torch.randint(VOCAB, (size.rows, size.context + 1)).to(device)
        self.model, self.size = FORMS[form](model, size), size

    def run(self) -> Tensor:
        """Run forward pass, loss and backward pass; return the logits [B, T, V]."""
        self.model.zero_grad()
        logits_BTV = self.model(self.ids_BT[:, :-1])
        F.cross_entropy(logits_BTV.flatten(0, 1), self.ids_BT[:, 1:].flatten()).backward()
        return logits_BTV.detach()

    def digest(self) -> Digest:
        """Run a step and record its results. Causal kernels count only the pairs that they need, about half."""
        causal = (self.size.context + 1) / (2 * self.size.context)
        with FlopCounterMode(display=False) as counter:
            logits = self.run()
        counts = counter.get_flop_counts()["Global"]
        gradients = dict(sorted(self.gradients().items()))
        return Digest(
            logits=logits.cpu().numpy(),
            norms=np.array([gradient.norm().item() for gradient in gradients.values()]),
            directions=np.array([(gradient.flatten() * _wave(gradient)).sum().item() for gradient in gradients.values()]),
            operations=round(sum(count * (causal if "attention" in str(kernel) else 1) for kernel, count in counts.items())),
        )

    def gradients(self) -> dict[str, Tensor]:
        named = self.model.named_parameters()
        found = {name: parameter.grad for name, parameter in named if not name.endswith("key.bias")}  # it is not trained
        return found if isinstance(self.model, ReferenceDecoder) else unpack(found)


def _wave(tensor: Tensor) -> Tensor:
    """A fixed direction with which a gradient is not aligned by chance."""
    return torch.arange(tensor.numel(), device=tensor.device).cos()


class Worker:
    """An object in a separate process; its methods are called by name."""

    def __init__(self, kind: type, *arguments: object) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["support.reference", "torch._dynamo"])  # slow to import
        self.pool = ProcessPoolExecutor(1, context, initializer=_make, initargs=(kind, *arguments))

    def ask(self, method: str) -> object:
        return self.pool.submit(_ask, method).result()

    def close(self) -> None:
        self.pool.shutdown()


def _make(kind: type, *arguments: object) -> None:
    global _made
    _made = kind(*arguments)


def _ask(method: str) -> object:
    return getattr(_made, method)()


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--sizes", choices=SIZES, nargs="+", default=[name for name in SIZES if name != "tiny"], metavar="NAME")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = read_json(options.json) if options.json and options.json.exists() else {}
    for name in options.sizes:
        if name not in found:
            rows = measure(SIZES[name], options.threads, options.device, options.repeats, options.seconds)
            found[name] = {"threads": options.threads, "device": options.device, "rows": rows}
            if options.json:
                write_json(options.json, found)
        print(report(name, **found[name]), end="\n\n", flush=True)


def report(name: str, threads: int, device: str, rows: list[dict]) -> str:
    """The table of one size; all figures are for one step, and `x` is relative to the plain loop."""
    size, clock = SIZES[name], "wall" if device == "cuda" else "cpu"
    figures = [{**row, "kept": row["peak"] - row["weights"], "floor": row[f"floor_{clock}"]} for row in rows]
    plain = next(row for row in figures if row["form"] == REFERENCE)
    for row in figures:
        row["x"] = {what: plain[what] / row[what] for what in ("wall", "cpu", "operations", "peak", "kept")}
        row["above"] = row[clock] / row["floor"]
        row |= {"gflop": row["operations"] / 1e9, "peak_mb": row["peak"] / 1e6, "kept_mb": row["kept"] / 1e6}
    rate = plain["operations"] / plain["floor"]
    head = f"{name}: {size.rows} * {size.context:,} tokens, {device}, threads: {threads}; {rate / 1e9:,.0f} GFLOP a {clock} second"
    return f"{head}\n{table_of(figures, COLUMNS)}"


def measure(size: Size, threads: int, device: str, repeats: int, seconds: float) -> list[dict]:
    """The figures of all forms at that size, one row per form."""
    maps = 4 * size.rows * size.context**2 * size.architecture.n_heads * sum(stack.layers for stack in size.architecture.stacks)
    forms = [form for form in FORMS if form != "published" or maps <= MAPS]
    workers = {form: Worker(Bench, form, size, threads, device) for form in forms}
    rate = Worker(Rate, threads, device)
    digests = {form: worker.ask("digest") for form, worker in workers.items()}
    for form in forms:
        check(form, digests[form], digests[REFERENCE])
    times: dict[str, list[tuple[float, float]]] = {form: [] for form in forms}
    rates = []
    for _ in range(repeats):
        for form, worker in workers.items():
            if sum(wall for wall, _ in times[form]) < seconds:
                times[form].append(worker.ask("time"))
                rates.append(rate.ask("time"))
    rows = []
    per_operation = medians(rates)
    for form, worker in workers.items():
        wall, cpu = medians(times[form])
        operations = digests[form].operations
        floor_wall, floor_cpu = (operations * pace for pace in per_operation)
        row = {"form": form, "wall": wall, "cpu": cpu, "turns": len(times[form]), "operations": operations}
        rows.append({**row, "floor_wall": floor_wall, "floor_cpu": floor_cpu, **worker.ask("memory")})
    for worker in (rate, *workers.values()):
        worker.close()
    return rows


def check(form: str, found: Digest, wanted: Digest) -> None:
    """Raise `AssertionError` if a form has other results. Gradients that are zero in theory are rounding errors."""
    scale = wanted.norms + 1e-3 * wanted.norms.max()
    errors = {
        "logits": (np.abs(found.logits - wanted.logits).max() / np.abs(wanted.logits).max(), LOGITS),
        "the lengths of gradients": ((np.abs(found.norms - wanted.norms) / scale).max(), GRADIENTS),
        "the directions of gradients": ((np.abs(found.directions - wanted.directions) / scale).max(), GRADIENTS),
    }
    for what, (error, tolerance) in errors.items():
        assert error < tolerance, f"{form} and {REFERENCE} differ by {error:.1e} in {what}"


if __name__ == "__main__":
    main()
