"""Every variant of the family at a size for tests, and the larger bases that they must also build on."""

from __future__ import annotations

from stacklm.config.model import Stack, Stacked
from stacklm.model.family import variants
from stacklm.model.presets import PRESETS

VOCAB, CONTEXT = 40, 12
TINY = Stacked(width=16, heads=2, stacks=(Stack(4, 4, 24), Stack(4, 4, 24), Stack(4, 8, 32)))
VARIANTS = variants(TINY, CONTEXT)
LAPTOP = Stacked(width=128, heads=4, stacks=(Stack(16, 8, 512), Stack(16, 16, 1024)))
BASES = {"laptop": (LAPTOP, 4096, 256), **{name: (c.architecture, c.vocab_size, c.context) for name, c in PRESETS.items()}}
