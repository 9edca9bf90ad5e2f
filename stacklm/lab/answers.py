"""Scoring a synthetic task (`stacklm.lab.probes`): loss and accuracy where answers are due, and nowhere else."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import load_file

from stacklm.data.batches import evaluation_batches
from stacklm.data.shards import Shards
from stacklm.model.layers import LanguageModel
from stacklm.train.checkpoint import TENSORS
from stacklm.train.resume import step_of

LEARNT = 0.95
LEAST_BITS = 1e-9
"""In place of 0, which has no logarithm and no relative difference."""


@torch.no_grad()
def score_answers(
    model: LanguageModel, data: Shards, split: str, answers: NDArray[np.bool_], context: int, batch_size: int
) -> dict[str, Any]:
    """Of the tokens of a split where `answers` is true: bits for each, as `bits_per_byte` (an answer counts as one byte), the share
    of those that the model finds most likely, and their number."""
    nats, right, place = 0.0, 0, 0
    model.eval()
    for inputs_BT, targets_BT, mask_BT in evaluation_batches(data.split(split), context, batch_size):
        targets = targets_BT[mask_BT]
        asked = torch.from_numpy(answers[place : place + len(targets)])
        place += len(targets)
        logits = model(inputs_BT)[mask_BT][asked].double()
        nats += F.cross_entropy(logits, targets[asked], reduction="sum").item()
        right += int((logits.argmax(-1) == targets[asked]).sum())
    total = int(answers.sum())
    return {"bits_per_byte": max(nats / math.log(2) / total, LEAST_BITS), "accuracy": right / total, "answers": total}


def learning(model: LanguageModel, run: Path, *arguments: Any) -> Iterator[tuple[int, float]]:
    """The step and accuracy of each checkpoint that a run has kept, in order; the model has the last one's weights afterwards.

    `arguments` are those of `score_answers` after the model.
    """
    for folder in sorted((run / "checkpoints").glob("step-*")):
        tensors = load_file(folder / TENSORS)
        weights = {name.removeprefix("model/"): tensor for name, tensor in tensors.items() if name.startswith("model/")}
        model.load_state_dict(weights, strict=False)  # a tied head goes by one of its names
        yield step_of(folder), score_answers(model, *arguments)["accuracy"]
