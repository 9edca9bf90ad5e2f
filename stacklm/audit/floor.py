"""What can be learnt: from random tokens nothing, and something from a stream that repeats itself."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from stacklm.audit.certificate import Fault, claims
from stacklm.audit.data import Machinery, counting
from stacklm.config.optimizer import AdamW
from stacklm.data.shards import TokenStream
from stacklm.train.optimizer import build_optimizer

VOCAB, CONTEXT, BATCH, STEPS = 8, 8, 16, 60
OPTIMIZER = AdamW(peak_lr=3e-3)
NOISE = 7.0
"""Standard errors below ln V at which a loss is no chance any more: one run in two million, with an error told from 20 steps."""


@claims("trained on random tokens, each seen once, the model does not go below a loss of ln V")
def floor(fresh: Callable[[int, int], nn.Module], machinery: Machinery) -> str:
    """`fresh` builds a model for a vocabulary and a context, both small here. A loss is taken before the update with its batch, so
    that of a causal model can not be expected to be below; with a leak it is within seconds.
    """
    model = fresh(VOCAB, CONTEXT)
    tokens = np.random.Philox(key=0).random_raw(STEPS * BATCH * CONTEXT).astype(np.int64) % VOCAB
    losses = train(model, TokenStream([tokens], VOCAB - 1, documents=0, bytes=0, words=0), CONTEXT, STEPS, machinery)
    above = torch.tensor(losses[-STEPS // 3 :], dtype=torch.float64) - math.log(VOCAB)
    mean, error = above.mean().item(), above.std().item() / len(above) ** 0.5
    if not mean > -NOISE * error:
        raise Fault(
            f"below the floor: a loss of {math.log(VOCAB) + mean:.3f} nats on random tokens, where none can have less than "
            f"ln {VOCAB} = {math.log(VOCAB):.3f} ({-mean / error:.0f} standard errors): the model is told the answer"
        )
    return f"{mean:+.4f} nats from ln {VOCAB} after {STEPS} steps, noise {error:.4f}"


def train(model: nn.Module, stream: TokenStream, context: int, steps: int, machinery: Machinery) -> list[float]:
    """Some steps of training in place; the mean loss of each, in nats per token, before its update."""
    device = next(model.parameters()).device
    optimizer = build_optimizer(model.train(), OPTIMIZER)
    objective = machinery.objective(model)
    batches = machinery.train_batches(stream, context, BATCH, 0)
    found = []
    for step in range(steps):
        inputs_BT, targets_BT = (tensor.to(device) for tensor in batches.batch(step))
        loss = objective(inputs_BT, targets_BT) / targets_BT.numel()
        model.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def train_briefly(model: nn.Module, vocab_size: int, context: int, machinery: Machinery) -> None:
    """A few steps, in place, on a stream that can be learnt."""
    train(model, counting(max(vocab_size, BATCH * context), vocab_size), context, steps=10, machinery=machinery)
