"""Score models on a synthetic task (`stacklm.lab.probes`): loss and accuracy on its answers, the only targets."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from stacklm.data.batches import evaluation_batches
from stacklm.data.shards import Shards
from stacklm.model.layers import LanguageModel
from stacklm.train.checkpoint import TENSORS
from stacklm.train.resume import step_of

LEARNT = 0.95
LEAST_BITS = 1e-9
"""Replaces 0, which has no logarithm and no relative difference."""


@torch.no_grad()
def score_answers(model: LanguageModel, data: Shards, split: str, context: int, batch_size: int) -> dict[str, Any]:
    """Scores on the answers of a split: bits per answer, as `bits_per_byte` (an answer counts as one byte), accuracy (the share of
    answers to which the model gives the highest probability), and the number of answers."""
    nats, right, total = 0.0, 0, 0
    model.eval()
    for inputs_BT, targets_BT, mask_BT in evaluation_batches(data.split(split), context, batch_size):
        targets, logits = targets_BT[mask_BT], model(inputs_BT)[mask_BT].double()
        nats += F.cross_entropy(logits, targets, reduction="sum").item()
        right += int((logits.argmax(-1) == targets).sum())
        total += len(targets)
    return {"bits_per_byte": max(nats / math.log(2) / total, LEAST_BITS), "accuracy": right / total, "answers": total}


def learning(model: LanguageModel, run: Path, *arguments: Any) -> Iterator[tuple[int, float]]:
    """Yield step and accuracy of each kept checkpoint of a run, in order; afterwards the model has the weights of the last one.

    `arguments` are those of `score_answers` after the model.
    """
    for folder in sorted((run / "checkpoints").glob("step-*")):
        tensors = load_file(folder / TENSORS)
        weights = {name.removeprefix("model/"): tensor for name, tensor in tensors.items() if name.startswith("model/")}
        model.load_state_dict(weights, strict=False)  # a tied head is saved under only one of its names
        yield step_of(folder), score_answers(model, *arguments)["accuracy"]
