"""Streaming ids and text: equal to full forward passes, in whole characters, up to the end of the document."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from stacklm.config.evaluate import Evaluate, Sample
from stacklm.config.schema import ParamsError, read
from stacklm.evaluate.generate import CACHES, choose, continue_text, generate, stream
from stacklm.model.build import build
from stacklm.model.cache import INPUTS, KEYS_AND_VALUES, Decoder
from stacklm.model.store import StoreError
from support.model_variants import scattered
from support.text_model import CONTEXT, END, Bytes, Reciting, write_text_models
from support.train_files import MODELS, VOCAB

DECODED = {"stacked, keys and values": KEYS_AND_VALUES, "stacked, inputs": INPUTS, "dense, keys and values": KEYS_AND_VALUES}


class Counting(nn.Module):
    """Always goes on with the next number, and keeps the inputs it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(VOCAB, VOCAB)
        nn.init.eye_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.seen: list[list[int]] = []

    def features(self, ids_BT: torch.Tensor) -> torch.Tensor:
        self.seen.append(ids_BT[0].tolist())
        return 100.0 * nn.functional.one_hot((ids_BT + 1) % VOCAB, VOCAB)


def with_full_forwards(model: nn.Module, ids: list[int], settings: Sample) -> Iterator[int]:
    """The same draws, from one full forward for each token."""
    generator = torch.Generator().manual_seed(settings.seed)
    window = ids[-CONTEXT:]
    for _ in range(settings.max_new_tokens):
        if len(window) > CONTEXT:
            window = window[-CONTEXT // 2 :]
        window.append(choose(model(torch.tensor([window]))[0, -1].detach(), settings, generator))
        yield window[-1]


def made(name: str) -> nn.Module:
    torch.manual_seed(5)
    return scattered(build(MODELS[name.partition(",")[0]].architecture, VOCAB, CONTEXT).eval(), 0.2)


@pytest.mark.parametrize(
    ("context", "ids", "said", "seen"),
    [
        (5, [7, 3], [4, 5, 6, 7], [[7, 3], [4], [5], [6]]),
        (4, [1, 2, 3], [4, 5, 6, 7, 8, 9], [[1, 2, 3], [4], [4, 5], [6], [7], [7, 8]]),
        (4, [0, 1, 2, 3, 4, 5, 6, 7, 8], [9, 10], [[5, 6, 7, 8], [8, 9]]),  # the last of a long prompt
        (1, [3, 7], [8, 9, 10], [[7], [8], [9]]),
    ],
)
def test_a_token_is_read_once_while_the_context_lasts_then_its_later_half_again(
    context: int, ids: list[int], said: list[int], seen: list[list[int]]
) -> None:
    model = Counting().eval()
    assert list(generate(Decoder(model, context), ids, Sample(max_new_tokens=len(said)))) == said
    assert model.seen == seen


@pytest.mark.parametrize("name", DECODED)
@pytest.mark.parametrize(
    "settings", [Sample(max_new_tokens=60, temperature=0.0), Sample(max_new_tokens=60, top_k=9, top_p=0.9)], ids=["best", "drawn"]
)
def test_the_text_is_that_of_full_forwards(name: str, settings: Sample) -> None:
    model = made(name)
    ids = list(generate(Decoder(model, CONTEXT, DECODED[name]), [2, 7], settings))
    assert ids == list(with_full_forwards(model, [2, 7], settings))
    assert len(set(ids)) >= 3


def test_the_seed_decides_and_a_decoder_can_be_used_again() -> None:
    decoder = Decoder(made("stacked"), CONTEXT)
    first, again, other = (list(generate(decoder, [0], Sample(max_new_tokens=30, seed=seed))) for seed in (1, 1, 2))
    assert first == again != other


def draws(settings: Sample) -> torch.Tensor:
    """How often each of four tokens of probability 0.4, 0.3, 0.2 and 0.1 is drawn in 2,000."""
    generator = torch.Generator().manual_seed(1)
    logits_V = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()
    return torch.bincount(torch.tensor([choose(logits_V, settings, generator) for _ in range(2000)]), minlength=4) / 2000


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "shares"),
    [
        (1.0, 0, 1.0, [0.1, 0.4, 0.2, 0.3]),
        (1.0, 99, 1.0, [0.1, 0.4, 0.2, 0.3]),
        (1.0, 2, 1.0, [0, 4 / 7, 0, 3 / 7]),
        (0.5, 0, 1.0, [1 / 30, 16 / 30, 4 / 30, 9 / 30]),
        (0.5, 3, 1.0, [0, 16 / 29, 4 / 29, 9 / 29]),
        (5.0, 1, 1.0, [0, 1, 0, 0]),
        (0.0, 0, 1.0, [0, 1, 0, 0]),
        (1.0, 0, 0.69, [0, 4 / 7, 0, 3 / 7]),
        (1.0, 0, 0.71, [0, 4 / 9, 2 / 9, 3 / 9]),
        (1.0, 0, 0.01, [0, 1, 0, 0]),
        (1.0, 3, 0.76, [0, 4 / 7, 0, 3 / 7]),  # of the three, 4/9 + 3/9 reach it
        (0.5, 0, 0.54, [0, 16 / 25, 0, 9 / 25]),  # of the sharpened, 16/30 do not yet
        (0.0, 0, 0.5, [0, 1, 0, 0]),
    ],
)
def test_temperature_top_k_and_top_p(temperature: float, top_k: int, top_p: float, shares: list[float]) -> None:
    drawn = draws(Sample(temperature=temperature, top_k=top_k, top_p=top_p))
    assert drawn.tolist() == pytest.approx(shares, abs=0.03)
    assert [share > 0 for share in drawn] == [share > 0 for share in shares]


def test_a_top_p_of_nothing_is_refused() -> None:
    with pytest.raises(ParamsError, match=r"top_p: 0.0 is not allowed; it must be > 0 and <= 1"):
        read(Sample, {"top_p": 0.0}, "sample")


def said(text: bytes, prompt: str = "a", tokens: int = 50) -> list[str]:
    """The pieces of a model that continues "a" with these bytes, all different, and ends."""
    model = Reciting([98, *(byte + 1 for byte in text), END]).eval()
    return list(stream(Decoder(model, 99), Bytes(), prompt, Sample(max_new_tokens=tokens, temperature=0.0)))


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
    assert "".join(stream(Decoder(model, 9), Bytes(), "", Sample(max_new_tokens=2, temperature=0.0))) == "xy"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text_models(tmp_path_factory.mktemp("text"))


def continued(
    folder: Path, name: str, cache: str = "kv", prompt: bytes | str = "the", tokenizer: Path | None = None, **sample: object
) -> str:
    config = Evaluate(sample=Sample(**{"max_new_tokens": 40, **sample}), device="cpu", threads=1)
    return "".join(continue_text(config, folder / name, tokenizer or folder / "tokenizer", prompt, cache))


def test_both_caches_say_the_same(folder: Path) -> None:
    texts = {continued(folder, "stacked", cache) for cache in CACHES}
    assert len(texts) == 1
    assert len(texts.pop()) > 20


def test_the_seed_and_the_prompt_decide(folder: Path) -> None:
    first = continued(folder, "dense")
    assert first == continued(folder, "dense", prompt=b"the")
    assert len({first, continued(folder, "dense", seed=2), continued(folder, "dense", prompt="then")}) == 3


@pytest.mark.parametrize(("name", "known"), [("other", "tokenizer 0{64}"), ("unknown", "a tokenizer that is not known")])
def test_a_model_of_another_tokenizer_is_refused(folder: Path, name: str, known: str) -> None:
    """Ids would be in range and their text another."""
    with pytest.raises(StoreError, match=rf"{name}.config\.json: trained with {known}, not with [0-9a-f]{{64}}; take"):
        continued(folder, name)


def test_stack_inputs_are_refused_for_rotary_positions(folder: Path) -> None:
    with pytest.raises(ValueError, match="not enough to decode"):
        continued(folder, "dense", "inputs")
