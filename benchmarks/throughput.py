"""Training throughput in tokens per second: a dense and a stacked model compared with a textbook GPT, and the data loader.

    python benchmarks/throughput.py [--sizes small medium] [--device cpu] [--threads 2] [--rounds 5] [--json FILE]

The dense and stacked models are trained with the trainer's `train_step`, the textbook GPT with a textbook loop (below): learned
positions, LayerNorm, GELU, all logits at once, torch's default optimizer. All see the same tokens, the source code of Python's
standard library as bytes, in the same batches with the same learning rates. They alternate: a round is a few steps of each, and
figures are medians over rounds. `CPU` is the ratio of CPU times, which other work on the machine affects less than wall time.
`loss` is the mean over the last round. `equal loss` is the speedup over the textbook GPT, in CPU time (on a GPU wall time), to the
first round with at most the textbook's final loss (0: not reached). Utilisation is the rate of a model's FLOPs
(`stacklm.model.count`; for the textbook GPT its matrices and causal attention) divided by that of a large matrix product, measured
in every round.

The data loader is a `TrainBatches` over a memory-mapped file, in batches per second and as a multiple of what the fastest model
needs.
"""

from __future__ import annotations

import math
import statistics
import sysconfig
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from bench import command_line, medians, parameters_of, stream_of, table_of, timed
from torch import Tensor, nn

from stacklm.config.model import Architecture, Dense, FactoredAttention, Model, Stack, Stacked
from stacklm.config.optimizer import AdamW
from stacklm.config.train import Train
from stacklm.data.batches import TrainBatches
from stacklm.data.shards import TokenStream
from stacklm.files import write_json
from stacklm.model.build import PRESETS
from stacklm.plan.memory import fresh_run
from stacklm.train.device import setup_device
from stacklm.train.optimizer import lr_factor
from stacklm.train.trainer import Prefetch, train_step

END, BYTES = 256, 2**22
"""The end token, after the 256 bytes, and the maximum bytes of text."""
COLUMNS = (
    ("model", "{model}"),
    ("parameters", "{parameters:,}"),
    ("tokens/s", "{tokens_per_second:,.0f}"),
    ("ratio", "{ratio:.2f}"),
    ("CPU", "{cpu_ratio:.2f}"),
    ("utilisation", "{utilisation:.1%}"),
    ("loss", "{loss:.3f}"),
    ("equal loss", "{equal_loss:.2f}"),
)


@dataclass(frozen=True)
class Size:
    """The shape of the textbook GPT, the batch, stacklm's models with about as many parameters, and the steps per round."""

    layers: int
    width: int
    heads: int
    context: int
    batch: int
    ours: dict[str, Architecture]
    steps: int
    vocab_size: int = END + 1
    lr: float = 1e-3


MODERN = {"attention": FactoredAttention(rope=True, qk_norm=True), "ffn": "relu2", "residual": True}
SIZES = {
    "small": Size(
        layers=4,
        width=128,
        heads=4,
        context=64,
        batch=12,
        ours={"dense": Dense(128, 4, 4, 512), "stacked": Stacked(128, 4, (Stack(2, 64, 384),) * 3, **MODERN)},
        steps=20,
    ),
    "medium": Size(
        layers=6,
        width=384,
        heads=6,
        context=256,
        batch=64,
        ours={"dense": Dense(384, 6, 6, 1536), "stacked": Stacked(384, 6, (Stack(2, 192, 1152),) * 4, **MODERN)},
        steps=1,
    ),
    "124M": Size(
        layers=12,
        width=768,
        heads=12,
        context=1024,
        batch=16,
        ours={"dense": Dense(768, 12, 12, 3072, tie_embeddings=True), "stacked": PRESETS["seed-2x64"].architecture},
        steps=10,
        vocab_size=50_304,
    ),
}


class Textbook(nn.Module):
    """GPT-2 (Radford et al. 2019) without dropout, as written in tutorials."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.tokens = nn.Embedding(size.vocab_size, size.width)
        self.positions = nn.Embedding(size.context, size.width)
        self.blocks = nn.Sequential(*(TextbookBlock(size.width, size.heads) for _ in range(size.layers)))
        self.norm = nn.LayerNorm(size.width)
        self.head = nn.Linear(size.width, size.vocab_size, bias=False)
        self.apply(self._start)

    def _start(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(self, ids_BT: Tensor) -> Tensor:
        x_BTC = self.tokens(ids_BT) + self.positions(torch.arange(ids_BT.shape[1], device=ids_BT.device))
        return self.head(self.norm(self.blocks(x_BTC)))

    def training_flops_per_token(self, context: int) -> int:
        matrices = sum(module.weight.numel() for module in self.modules() if isinstance(module, nn.Linear))
        attention = len(self.blocks) * 2 * self.norm.normalized_shape[0] * (context + 1) // 2
        return 3 * 2 * (matrices + attention)


class TextbookBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.projection = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x_BTC: Tensor) -> Tensor:
        heads = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.attention_norm(x_BTC)).chunk(3, -1))
        a_BHTK = F.scaled_dot_product_attention(*heads, is_causal=True)
        x_BTC = x_BTC + self.projection(a_BHTK.transpose(1, 2).flatten(2))
        return x_BTC + self.mlp(self.mlp_norm(x_BTC))


@dataclass(frozen=True)
class Runner:
    """A model in training: `step` takes the training step of that number and returns the loss before it."""

    name: str
    parameters: int
    flops_per_token: int
    step: Callable[[int], Tensor]


def textbook(size: Size, config: Train, batches: TrainBatches, device: torch.device) -> Runner:
    torch.manual_seed(config.seed)
    model = Textbook(size).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=size.lr, betas=(0.9, 0.95), weight_decay=0.1)

    def step(number: int) -> Tensor:
        for group in optimizer.param_groups:
            group["lr"] = size.lr * lr_factor(number, config)
        inputs_BT, targets_BT = (tensor.to(device) for tensor in batches.batch(number - 1))
        with torch.autocast(device.type, torch.bfloat16) if config.precision == "bf16" else nullcontext():
            loss = F.cross_entropy(model(inputs_BT).flatten(0, 1), targets_BT.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        return loss.detach()

    return Runner("textbook", parameters_of(model), model.training_flops_per_token(size.context), step)


def ours(name: str, size: Size, config: Train, batches: TrainBatches, device: torch.device) -> Runner:
    prefetch = Prefetch(batches.stream, batches.context, batches.batch_size, batches.seed, device=device)
    run = fresh_run(Model(size.ours[name], AdamW(peak_lr=size.lr)), size.vocab_size, config, prefetch, device)
    return Runner(name, parameters_of(run.model), run.flops_per_token, lambda step: train_step(run, step).loss)


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--sizes", choices=SIZES, nargs="+", default=["small", "medium"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="device; cuda uses bf16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="compile the dense and stacked models with torch.compile")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = setup_device(options.device, options.threads)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        stream = library(Path(folder) / "tokens.bin")
        for name in options.sizes:
            size = SIZES[name]
            config = Train(
                max_steps=10 * size.steps * options.rounds,
                context_length=size.context,
                global_batch_size=size.batch,
                micro_batch_size=size.batch,
                warmup_steps=size.steps,
                precision="bf16" if device.type == "cuda" else "fp32",
                compile=options.compile,
            )
            batches = TrainBatches(stream, size.context, size.batch, config.seed)
            runners = [textbook(size, config, batches, device), *(ours(kind, size, config, batches, device) for kind in size.ours)]
            rows += compare(name, size, runners, options.rounds, device)
            fastest = max(row["tokens_per_second"] for row in rows if row["size"] == name)
            loaded = loader(batches)
            times = loaded * size.batch * size.context / fastest
            print(f"loader: {loaded:,.0f} batches/s, {times:,.0f} times what the fastest takes\n", flush=True)
    if options.json:
        write_json(options.json, {"torch": torch.__version__, "device": str(device), "threads": options.threads, "rows": rows})


def compare(name: str, size: Size, runners: list[Runner], rounds: int, device: torch.device) -> list[dict]:
    """The figures of each model; the time of the first round does not count."""
    clocks: dict[str, list[tuple[float, float]]] = {runner.name: [] for runner in runners}
    losses: dict[str, list[float]] = {runner.name: [] for runner in runners}
    rates = []
    for number in range(rounds + 1):
        for runner in runners:
            steps = range(1 + number * size.steps, 1 + (number + 1) * size.steps)
            found = timed(lambda runner=runner, steps=steps: [runner.step(step) for step in steps])
            clocks[runner.name].append((found.wall, found.cpu))
            losses[runner.name].append(torch.stack(found.result).mean().item())
        rates.append(matrix_rate(device))
    tokens, rate = size.steps * size.batch * size.context, statistics.median(rates)
    shape = f"{size.layers} layers, {size.width} wide, context {size.context}, batch {size.batch}"
    rows: list[dict] = []
    aim, untils = losses[runners[0].name][-1], []
    for runner in runners:
        wall, spent = medians(clocks[runner.name][1:])
        reached = next((number for number, loss in enumerate(losses[runner.name], 1) if loss <= aim), math.inf)
        row = {"size": name, "model": runner.name, "parameters": runner.parameters, "wall": wall, "spent": spent}
        first = rows[0] if rows else row
        untils.append(reached * (wall if device.type == "cuda" else spent))
        row |= {
            "tokens_per_second": tokens / wall,
            "ratio": first["wall"] / wall,
            "cpu_ratio": first["spent"] / spent,
            "utilisation": runner.flops_per_token * tokens / wall / rate,
            "loss": losses[runner.name][-1],
            "equal_loss": untils[0] / untils[-1],
        }
        rows.append(row)
    print(f"{name}: {shape}; matrices {rate / 1e9:,.0f} GFLOP/s\n{table_of(rows, COLUMNS)}")
    return rows


def matrix_rate(device: torch.device) -> float:
    """FLOPs per second of the fastest of several square matrix products, in the dtype of training."""
    width, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1536, torch.float32)
    left, right = torch.randn(2, width, width, device=device, dtype=dtype)
    return 2 * width**3 / min(timed(lambda: left @ right).wall for _ in range(5))


def loader(batches: TrainBatches, count: int = 200) -> float:
    """Batches per second of the data loader."""
    batches.batch(0)  # generates the order of the epoch
    return count / timed(lambda: [batches.batch(step) for step in range(1, count + 1)]).wall


def library(file: Path) -> TokenStream:
    """The start of Python's standard library as bytes, memory-mapped like shards."""
    sources = (path.read_bytes() for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")))
    np.frombuffer(b"".join(sources)[:BYTES], dtype=np.uint8).astype("<u2").tofile(file)
    return stream_of(np.memmap(file, dtype="<u2", mode="r"), END)


if __name__ == "__main__":
    main()
