"""Text as it comes: whole characters, up to the end of the document, from models on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from train_files import MODELS

from stacklm.config.evaluate import Evaluate, Sample
from stacklm.data import DataError
from stacklm.evaluate.text import CACHES, continue_text, stream
from stacklm.files import write_text
from stacklm.model.build import build
from stacklm.model.cache import Decoder
from stacklm.model.store import save_model

CONTEXT = 16
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
    """Says a text whose every id is new, then the first id again, from wherever it is asked to go on."""

    def __init__(self, ids: list[int]) -> None:
        super().__init__()
        self.head = nn.Linear(257, 257, bias=False)
        nn.init.eye_(self.head.weight)
        self.after = dict(zip(ids, [*ids[1:], ids[0]], strict=True))

    def features(self, ids_BT: torch.Tensor) -> torch.Tensor:
        following = torch.tensor([[self.after.get(i, 0) for i in ids_BT[0].tolist()]])
        return 100.0 * nn.functional.one_hot(following, 257)


def said(text: bytes, prompt: str = "a", tokens: int = 50) -> list[str]:
    """The pieces that come of a model that goes on from "a" with these bytes, all different, and ends."""
    model = Reciting([98, *(byte + 1 for byte in text), END]).eval()
    return list(stream(Decoder(model, 99), Bytes(), prompt, Sample(tokens=tokens, temperature=0.0)))


def test_a_character_is_held_back_until_it_is_whole() -> None:
    assert said("xé€".encode()) == ["x", "", "é", "", "", "€"]


def test_bytes_that_are_no_character_are_replaced() -> None:
    assert "".join(said(b"x\xffy")) == "x\ufffdy"


def test_half_a_character_at_the_end_is_not_lost() -> None:
    assert said("xé".encode(), tokens=2) == ["x", "", "\ufffd"]


def test_the_end_of_the_document_ends_the_text() -> None:
    assert "".join(said(b"xyz")) == "xyz"


def test_the_prompt_is_the_start_of_a_document() -> None:
    model = Reciting([END, 121, 122]).eval()
    assert "".join(stream(Decoder(model, 9), Bytes(), "", Sample(tokens=2, temperature=0.0))) == "xy"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of bytes and characters, and models of random weights."""
    from stacklm.config.data import Data, FilesSource
    from stacklm.config.tokenizer import TokenizerConfig
    from stacklm.data.download import download
    from stacklm.data.sources import list_inputs
    from stacklm.data.tokenizer import train_tokenizer

    root = tmp_path_factory.mktemp("text")
    for i in range(40):
        write_text(root / f"{i}.txt", f"the sum of {i} and {i * i} is {i + i * i}\n" * 3)
    data = Data(FilesSource(paths=(f"{root}/*.txt",)), valid_fraction=0.2, test_fraction=0.2)
    list_inputs(data, root / "inputs.json")
    download(data, root / "inputs.json", root / "documents")
    train_tokenizer(TokenizerConfig(260), root / "documents", root / "tokenizer")
    for name, vocab_size in {"stacked": 260, "dense": 260, "other": 270}.items():
        torch.manual_seed(4)
        architecture = MODELS["dense" if name == "other" else name].architecture
        save_model(root / name, build(architecture, vocab_size, CONTEXT), architecture, vocab_size, CONTEXT)
    return root


def continued(folder: Path, name: str, cache: str = "kv", prompt: bytes | str = "the", **sample: object) -> str:
    config = Evaluate(sample=Sample(**{"tokens": 40, **sample}), device="cpu", threads=1)
    return "".join(continue_text(config, folder / name, folder / "tokenizer", prompt, cache))


def test_both_caches_say_the_same(folder: Path) -> None:
    texts = {continued(folder, "stacked", cache) for cache in CACHES}
    assert len(texts) == 1
    assert len(texts.pop()) > 20


def test_the_seed_and_the_prompt_decide(folder: Path) -> None:
    first = continued(folder, "dense")
    assert first == continued(folder, "dense", prompt=b"the")
    assert len({first, continued(folder, "dense", seed=2), continued(folder, "dense", prompt="then")}) == 3


def test_a_model_of_another_tokenizer_is_refused(folder: Path) -> None:
    with pytest.raises(DataError, match=r"other was trained with 270 tokens, but .*tokenizer has 260"):
        continued(folder, "other")


def test_stack_inputs_are_refused_for_rotary_positions(folder: Path) -> None:
    with pytest.raises(ValueError, match="not enough to decode"):
        continued(folder, "dense", "x")
