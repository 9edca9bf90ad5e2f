"""The two models that the project began with, as published: a vocabulary of 110,000, a context of 2,048, 4 heads."""

from __future__ import annotations

from stacklm.config.model import Stack, Stacked
from stacklm.model.build import ModelConfig

PRESETS: dict[str, ModelConfig] = {
    # 436,967,344 parameters; published as "128 layers, about 400M"
    "seed-2x64": ModelConfig(
        Stacked(
            width=512,
            heads=4,
            stacks=(Stack(layers=64, features=8, hidden=2048), Stack(layers=64, features=32, hidden=4096)),
            dropout=0.1,
        ),
        vocab_size=110_000,
        context=2048,
    ),
    # 514,390,448 parameters; published as "1024, 8 layers, 4 stacks", with a slip in its size (78M)
    "seed-4x8": ModelConfig(
        Stacked(
            width=1024,
            heads=4,
            stacks=(*(Stack(layers=8, features=128, hidden=2048),) * 3, Stack(layers=8, features=256, hidden=4096)),
            dropout=0.1,
        ),
        vocab_size=110_000,
        context=2048,
    ),
}
