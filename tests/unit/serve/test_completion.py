"""The pieces of a completion: whole characters, no stop sequences, offsets of tokens, probabilities of the model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from stacklm.config.evaluate import Evaluate, Sample
from stacklm.data.tokenizer import Tokenizer
from stacklm.evaluate.generate import generate, open_decoder, stream
from stacklm.model.cache import Decoder
from stacklm.model.store import load_model
from stacklm.serve.completion import Piece, Prompt, complete, spelling
from support.text_model import CONTEXT, END, Bytes, Reciting, write_text_models


def recited(text: bytes, *stops: str, tokens: int = 50, top: int | None = None, echo: bool = False) -> list[Piece]:
    """The pieces of a model that continues "a" with these bytes, all different, and ends."""
    model = Reciting([98, *(byte + 1 for byte in text), END]).eval()
    settings = Sample(max_new_tokens=tokens, temperature=0.0)
    return list(complete(Decoder(model, 99), Bytes(), Prompt([END, 98], 1), settings, stops, echo, top))


def text_of(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


@pytest.mark.parametrize(
    ("stops", "text"),
    [
        (["d"], "bc"),
        (["ef"], "bcd"),
        (["xyz", "de", "f"], "bc"),
        (["f", "cdef"], "b"),  # found with the same token, and earlier in the text
        (["b"], ""),
        (["ab"], "bcdefg"),  # not across the prompt
        (["gh"], "bcdefg"),  # what was held back comes at the end
        (["é"], "bcdefg"),
    ],
)
@pytest.mark.parametrize("echo", [False, True])
def test_the_text_ends_before_the_first_stop_sequence(stops: list[str], text: str, echo: bool) -> None:
    pieces = recited(b"bcdefg", *stops, echo=echo)
    assert text_of(pieces) == "a" * echo + text
    assert [piece.finish for piece in pieces] == [*[None] * (len(pieces) - 1), "stop"]


def test_a_stop_sequence_inside_a_character_that_came_in_parts() -> None:
    assert text_of(recited("bé€c".encode(), "€")) == "bé"


def test_pieces_come_at_once_but_for_what_may_begin_a_stop_sequence() -> None:
    assert [piece.text for piece in recited(b"bcdxy", "cdef", tokens=5)] == ["b", "", "", "cdx", "y", ""]
    assert [piece.text for piece in recited("é".encode(), tokens=2)] == ["", "é", ""]


def test_the_length_ends_it_and_half_a_character_is_not_lost() -> None:
    pieces = recited("bé".encode(), tokens=2)
    assert text_of(pieces) == "b\ufffd"
    assert (pieces[-1].finish, pieces[-1].drawn) == ("length", 2)


def test_no_token_is_drawn_where_none_is_asked_for() -> None:
    assert recited(b"bcd", tokens=0, echo=True) == [Piece("a", []), Piece("", [], 0, "length")]


def test_tokens_begin_where_their_characters_do() -> None:
    tokens = [token for piece in recited("bé€c".encode(), top=1, echo=True) for token in piece.tokens]
    parts = ["bytes:\\xc3", "bytes:\\xa9", "bytes:\\xe2", "bytes:\\x82", "bytes:\\xac"]
    assert [token.text for token in tokens] == ["a", "b", *parts, "c", "<|endoftext|>"]
    assert [token.offset for token in tokens] == [0, 1, 2, 2, 3, 3, 3, 4, 5]


def test_a_token_after_half_a_character_begins_behind_its_replacement() -> None:
    tokens = [token for piece in recited(b"b\xe2\x82c\xffd\xc3", top=0) for token in piece.tokens]
    assert [token.offset for token in tokens] == [0, 1, 1, 2, 3, 4, 5, 6]  # "b", "\ufffd" of two, "c", "\ufffd", "d", "\ufffd", end


def test_tokens_of_a_stop_sequence_are_not_told_and_are_counted() -> None:
    pieces = recited(b"bcdefg", "de", top=0)
    assert [token.text for piece in pieces for token in piece.tokens] == ["b", "c"]
    assert pieces[-1].drawn == 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text_models(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def opened(folder: Path) -> tuple[Decoder, Tokenizer]:
    return open_decoder(Evaluate(device="cpu", threads=1), folder / "stacked", folder / "tokenizer")


@pytest.mark.parametrize("seed", [1, 2])
def test_the_text_is_that_of_generate(opened: tuple[Decoder, Tokenizer], seed: int) -> None:
    decoder, words = opened
    settings = Sample(max_new_tokens=40, top_k=20, top_p=0.9, seed=seed)
    pieces = list(complete(decoder, words, Prompt([words.end_id, *words.encode("the é")], 1), settings))
    assert text_of(pieces) == "".join(stream(decoder, words, "the é", settings))


@pytest.mark.parametrize("hidden", [0, 1])
def test_log_probabilities_are_those_of_a_full_forward(opened: tuple[Decoder, Tokenizer], folder: Path, hidden: int) -> None:
    decoder, words = opened
    ids = [words.end_id, *words.encode("the sum")]
    settings = Sample(max_new_tokens=CONTEXT - len(ids), temperature=0.7, top_k=3)
    whole = [*ids, *generate(decoder, ids, settings)]
    model, _ = load_model(folder / "stacked")
    with torch.no_grad():
        expected_TV = model.eval()(torch.tensor([whole]))[0].log_softmax(-1)

    pieces = list(complete(decoder, words, Prompt(ids, hidden), settings, echo=True, top=2))
    tokens = [token for piece in pieces for token in piece.tokens]
    assert [token.text for token in tokens] == [spelling(words, one) for one in whole[hidden:]]
    if not hidden:
        assert tokens[0].logprob is None and tokens[0].top is None  # nothing precedes it
    for token, row_V, following in zip(tokens[1 - hidden :], expected_TV[:-1], whole[1:], strict=True):
        likely = {spelling(words, one): float(row_V[one]) for one in [*row_V.topk(2).indices.tolist(), following]}
        assert token.logprob == token.top[token.text] == pytest.approx(float(row_V[following]), abs=1e-5)
        assert token.top == pytest.approx(likely, abs=1e-5)
