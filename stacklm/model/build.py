"""From settings to a model."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from stacklm.config.model import Architecture, Dense, Stacked
from stacklm.config.schema import Count
from stacklm.model.dense import DenseDecoder
from stacklm.model.stacked import StackedDecoder

DECODERS = {Dense: DenseDecoder, Stacked: StackedDecoder}


@dataclass(frozen=True)
class ModelConfig:
    """All that fixes the shape of a model."""

    architecture: Architecture
    vocab_size: Count
    context: Count


def build(architecture: Architecture, vocab_size: int, context: int) -> nn.Module:
    """A fresh model: `model(ids_BT)` gives logits [B, T, V]; `model.head(model.features(ids_BT))` is the same in two steps.

    The weights come from torch's global generator, so `torch.manual_seed` fixes them. Build on the CPU and then move the
    model, and they are the same on every device; inside `with torch.device("meta")` nothing is drawn or allocated.
    """
    return DECODERS[type(architecture)](architecture, vocab_size, context)
