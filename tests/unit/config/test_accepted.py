"""Accepted settings work: such models take optimizer steps and generate, and the largest can be built without memory."""

from __future__ import annotations

import random

import pytest
import torch

from stacklm.config.evaluate import Sample
from stacklm.config.model import Architecture
from stacklm.config.optimizer import AdamW, Optimizer
from stacklm.config.schema import FLOAT32, ParamsError, read
from stacklm.config.train import Train
from stacklm.evaluate.generate import choose
from stacklm.model.build import build
from stacklm.train.optimizer import build_optimizer, lr_factor, set_lr

TINY, HUGE = FLOAT32
NUMBERS = {
    "peak_lr": (TINY, 1e-8, 1e-3, 1.0, 100),
    "eps": (1e-20, 1e-8, 1),
    "weight_decay": (0, TINY, 0.1, 1, HUGE),
    "beta1": (0, TINY, 0.9, 0.999999),
    "beta2": (0, 0.95, 0.999999),
    "momentum": (0, 0.95, 0.999999),
    "ns_steps": (1, 5, 20),
    "beta2_decay": (-1, -TINY, -0.8, 0),
}
KINDS = {
    "adamw": ("peak_lr", "eps", "weight_decay", "beta1", "beta2"),
    "muon": ("peak_lr", "weight_decay", "momentum", "ns_steps"),
    "adafactor": ("peak_lr", "eps", "weight_decay", "beta2_decay"),
}


def an_optimizer(draw: random.Random) -> dict:
    kind = draw.choice(list(KINDS))
    chosen = {name: draw.choice(NUMBERS[name]) for name in KINDS[kind]}
    if kind == "muon":
        chosen["adamw"] = {name: draw.choice(NUMBERS[name]) for name in ("peak_lr", "eps", "beta1", "beta2")}
    return {"kind": kind, **chosen}


def an_architecture(draw: random.Random) -> dict:
    size, heads = draw.choice((1, 2, 3, 4, 6, 8, 12)), draw.choice((1, 2, 3, 4))
    if draw.random() < 0.4:
        return {
            "kind": "dense",
            "d_model": size,
            "n_heads": heads,
            "n_layers": draw.choice((1, 3)),
            "d_ff": draw.choice((1, 5)),
            "ffn": draw.choice(("relu2", "swiglu")),
            "conv_size": draw.choice((1, 4)),
            "tie_embeddings": draw.random() < 0.5,
        }
    layers = [n for n in (1, 2, 3, 4) if size % n == 0]
    stacks = [
        {"layers": n, "features": size // n, "d_ff": draw.choice((1, 5))} for n in draw.choices(layers, k=draw.choice((1, 2)))
    ]
    folded = {
        "kind": "factored",
        "qk_head_dim": draw.choice((None, 1, 2, 5)),
        "rope": draw.random() < 0.5,
        "qk_norm": draw.random() < 0.5,
        "kv_sharing": draw.choice(("layer", "stack")),
    }
    return {
        "kind": "stacked",
        "d_model": size,
        "n_heads": heads,
        "stacks": [*stacks[:-1], {**stacks[-1], "features": draw.choice((1, 2, size))}],
        "attention": draw.choice(({"kind": "published"}, folded)),
        "ffn": draw.choice(("per_layer", "relu2", "swiglu")),
        "residual": draw.random() < 0.5,
        "skip_connections": draw.choice(("none", "input", "dense")),
        "conv_size": draw.choice((1, 2, 16)),
        "tie_embeddings": draw.random() < 0.5,
        "tokens_per_extra_stack": draw.choice((0, 1, 2)),
        "dropout": draw.choice((0, 0.5, 0.99)),
    }


def accepted(kind: object, make, draw: random.Random):
    """The next drawn settings that the check accepts."""
    while True:
        try:
            return read(kind, make(draw))
        except ParamsError:
            pass


@pytest.mark.parametrize("seed", range(40))
def test_every_accepted_model_and_optimizer_takes_finite_steps(seed):
    draw = random.Random(seed)
    context, vocab_size = draw.choice((1, 2, 5)), 260
    architecture, optimizer = accepted(Architecture, an_architecture, draw), accepted(Optimizer, an_optimizer, draw)
    torch.manual_seed(2**63 - 1)
    model = build(architecture, vocab_size, context)
    optimizer = build_optimizer(model, optimizer)
    schedule = {"warmup_steps": draw.choice((0, 3)), "lr_schedule": draw.choice(("cosine", "linear", "wsd"))}
    train = Train(4, context, 2, 2, decay_fraction=draw.choice((0, TINY, 1)), final_lr_fraction=TINY, **schedule)
    ids_BT = torch.randint(vocab_size, (2, context + 1))
    for step in range(1, train.max_steps + 1):
        set_lr(optimizer, lr_factor(step, train))
        logits_BTV = model(ids_BT[:, :-1])
        torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), ids_BT[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert all(parameter.isfinite().all() for parameter in model.parameters()), (architecture, optimizer)


@pytest.mark.parametrize("gradient", [0.0, 1e-45, 1e-30, 3e-23, 1e-22, 1e-20, 1e-15, 1.0, 1e10])
def test_no_gradient_is_too_small_for_the_smallest_eps(gradient):
    """A second moment that underflows leaves `eps` alone to divide by; the update stays of the size of the learning rate."""
    weight = torch.nn.Linear(1, 1, bias=False)
    before = weight.weight.item()
    optimizer = torch.optim.AdamW(
        weight.parameters(), lr=1.0, betas=(AdamW.beta1, AdamW.beta2), eps=1e-20, weight_decay=0, fused=True
    )
    weight.weight.grad = torch.full((1, 1), gradient)
    optimizer.step()
    assert abs(weight.weight.item() - before) < 2


@pytest.mark.parametrize("temperature", [0, -0.0, TINY, 1e-30, 1e-3, 1, HUGE])
@pytest.mark.parametrize("top_p", [TINY, 0.5, 1])
def test_a_token_is_drawn_at_every_temperature(temperature, top_p):
    generator = torch.Generator().manual_seed(2**63 - 1)
    for scale in (0.0, 1e-30, 1.0, 1e30):
        logits_V = scale * torch.tensor([1.0, -2.0, 3.0, 3.0, -1.0])
        for top_k in (0, 1, 5, 2**63 - 1):
            drawn = choose(logits_V, read(Sample, {"temperature": temperature, "top_p": top_p, "top_k": top_k}), generator)
            assert 0 <= drawn < 5
            if temperature == TINY and scale:
                assert drawn in (2, 3)


@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "dense", "d_model": 2**20, "n_heads": 2**12, "n_layers": 2, "d_ff": 2**20},
        {"kind": "stacked", "d_model": 2**20, "n_heads": 1, "stacks": [{"layers": 4, "features": 2**20, "d_ff": 2**20}]},
    ],
    ids=lambda settings: settings["kind"],
)
def test_the_largest_sizes_fit_64_bits(settings):
    with torch.device("meta"):
        model = build(read(Architecture, settings), 2**24, 16)
    assert all(0 < parameter.nbytes < 2**63 for parameter in model.parameters())
