"""Models from outside this package, as a user would name them in params.yaml, and model files with faults."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from stacklm.config.model import HuggingFace, Python

FOLDER = Path(__file__).parent / "models"
LLAMA = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
MODELS = {
    "gpt": Python(f"{FOLDER}/gpt.py", "GPT"),
    "lstm": Python(f"{FOLDER}/lstm.py", "LSTM"),
    "linear-attention": Python(f"{FOLDER}/linear_attention.py", "Gated"),
    "llama": HuggingFace("LlamaConfig", settings=LLAMA),
}
"""Models with two layers of width 16 or 32 by default."""
needs_transformers = pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed")
every_model = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=needs_transformers if name == "llama" else ()) for name in MODELS]
)

HEADER = "import torch\nimport torch.nn.functional as F\nfrom torch import nn\n\n\n"
PLAIN = """\
class Mine(nn.Module):
    def __init__(self, vocab_size, context_length, width=16):
        super().__init__()
        self.embed = nn.Embedding(vocab_size, width)
        self.head = nn.Linear(width, vocab_size)

    def mix(self, x):
        return x.cumsum(1)

    def forward(self, ids):
        return self.head(self.mix(self.embed(ids)))
"""


def written(folder: Path, *changes: tuple[str, str], name: str = "mine.py", **settings: object) -> Python:
    """Write the model above to a file, with text replacements."""
    text = HEADER + PLAIN
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    (folder / name).write_text(text, encoding="utf-8")
    return Python(str(folder / name), "Mine", settings=settings)
