"""Building a model from its settings, and presets of the published models."""

from __future__ import annotations

from dataclasses import dataclass

from stacklm.config.model import Architecture, Dense, HuggingFace, Python, Stack, Stacked
from stacklm.config.schema import Count
from stacklm.model.custom import load_custom
from stacklm.model.dense import DenseDecoder
from stacklm.model.huggingface import from_transformers
from stacklm.model.layers import LanguageModel
from stacklm.model.stacked import StackedDecoder


@dataclass(frozen=True)
class ModelConfig:
    """Everything that determines the shape of a model."""

    architecture: Architecture
    vocab_size: Count
    context_length: Count


def build(architecture: Architecture, vocab_size: int, context: int) -> LanguageModel:
    """Build a model with freshly initialised weights.

    The weights come from torch's global generator, so `torch.manual_seed` fixes them. They are the same on every device if the
    model is built on the CPU and then moved; inside `with torch.device("meta")` nothing is sampled or allocated. Raises
    `ParamsError` for a model from a file that cannot be used.
    """
    if isinstance(architecture, Python):
        return load_custom(architecture, vocab_size, context)
    if isinstance(architecture, HuggingFace):
        return from_transformers(architecture, vocab_size, context)
    if isinstance(architecture, Dense):
        return DenseDecoder(architecture, vocab_size, context)
    return StackedDecoder(architecture, vocab_size, context)


PRESETS: dict[str, ModelConfig] = {
    # 436,967,344 parameters; published as "128 layers, about 400M"
    "seed-2x64": ModelConfig(
        Stacked(
            d_model=512,
            n_heads=4,
            stacks=(Stack(layers=64, features=8, d_ff=2048), Stack(layers=64, features=32, d_ff=4096)),
            dropout=0.1,
        ),
        vocab_size=110_000,
        context_length=2048,
    ),
    # 514,390,448 parameters; published as "1024, 8 layers, 4 stacks", with its size misstated (78M)
    "seed-4x8": ModelConfig(
        Stacked(
            d_model=1024,
            n_heads=4,
            stacks=(*(Stack(layers=8, features=128, d_ff=2048),) * 3, Stack(layers=8, features=256, d_ff=4096)),
            dropout=0.1,
        ),
        vocab_size=110_000,
        context_length=2048,
    ),
}
"""The two published models on which the project is based: vocabulary 110,000, context 2,048, 4 heads."""
