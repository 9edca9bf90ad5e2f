"""Models and tokenizers for tests of generation: one model that recites a text, and some with random weights."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from stacklm.config.data import FilesSource
from stacklm.data.tokenizer import Tokenizer
from stacklm.files import write_text
from stacklm.model.build import build
from stacklm.model.store import save_model
from support.corpus import prepare_tokenizer
from support.train_files import MODELS

CONTEXT = 16
TEXT_VOCAB = 260


def write_text_models(root: Path) -> Path:
    """Write the folders `tokenizer`, `stacked` and `dense`, and two models with another tokenizer, `other` and `unknown`."""
    for i in range(40):
        write_text(root / f"{i}.txt", f"the sum of {i} and {i * i} is {i + i * i}\n" * 3)
    digest = Tokenizer.load(prepare_tokenizer(root, FilesSource(paths=(f"{root}/*.txt",)), TEXT_VOCAB)).digest
    for name, known in {"stacked": digest, "dense": digest, "other": "0" * 64, "unknown": None}.items():
        torch.manual_seed(4)
        architecture = MODELS["stacked" if name == "stacked" else "dense"].architecture
        save_model(root / name, build(architecture, TEXT_VOCAB, CONTEXT), architecture, TEXT_VOCAB, CONTEXT, known)
    return root


END = 0


class Bytes:
    """A tokenizer in which id i is the byte i - 1, and 0 ends a document."""

    end_id = END
    vocab_size = 257

    def encode(self, text: str) -> list[int]:
        return [byte + 1 for byte in text.encode()]

    def decode(self, ids: list[int]) -> bytes:
        return bytes(i - 1 for i in ids if i)


class Reciting(nn.Module):
    """Continues a text of distinct ids from any position, and starts again after the last id."""

    def __init__(self, ids: list[int]) -> None:
        super().__init__()
        self.head = nn.Linear(257, 257, bias=False)
        nn.init.eye_(self.head.weight)
        self.after = dict(zip(ids, [*ids[1:], ids[0]], strict=True))

    def features(self, ids_BT: torch.Tensor) -> torch.Tensor:
        following = torch.tensor([[self.after.get(i, 0) for i in ids_BT[0].tolist()]])
        return 100.0 * nn.functional.one_hot(following, 257)
