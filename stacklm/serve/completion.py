"""One completion: its text up to a stop sequence as it comes, and its tokens with log-probabilities.

Dimension letters: T tokens, V vocabulary, W features.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from itertools import chain, islice, repeat
from typing import NamedTuple

import torch

from stacklm.config.evaluate import Sample
from stacklm.config.tokenizer import END_OF_TEXT
from stacklm.data.tokenizer import Tokenizer
from stacklm.evaluate.generate import draw
from stacklm.model.cache import Decoder

ROWS = 256
"""Positions whose logits are in memory at once."""


class Prompt(NamedTuple):
    """What the model reads. A text is the start of a document: an end token that `hidden` counts precedes it."""

    ids: list[int]
    hidden: int


class Token(NamedTuple):
    """Its spelling, the place of its first character in the text, and its log-probability, None where nothing precedes it.

    `top` has the most likely ones in its place by their spelling, and itself.
    """

    text: str
    offset: int
    logprob: float | None
    top: dict[str, float] | None


class Piece(NamedTuple):
    """Some more of a completion: characters that are final, the tokens that begin in them, how many were drawn so far."""

    text: str
    tokens: list[Token]
    drawn: int = 0
    finish: str | None = None


def complete(
    decoder: Decoder,
    words: Tokenizer,
    prompt: Prompt,
    settings: Sample,
    stops: Sequence[str] = (),
    echo: bool = False,
    top: int | None = None,
) -> Iterator[Piece]:
    """The text of `stacklm.evaluate.generate.stream`, up to the first of `stops`, as a piece for each token and a last one.

    `echo` puts the prompt before it. With `top`, pieces have tokens, the one that ends the document among them, each with
    the `top` most likely in its place: probabilities of the model, before temperature, `top_k` and `top_p`.
    """
    characters = codecs.getincrementaldecoder("utf-8")(errors="replace")
    text, tokens, drawn, finish = "", [], 0, "length"

    def add(token: int, logits_V: torch.Tensor | None) -> None:
        nonlocal text
        raw = words.decode([token])
        text += characters.decode(raw[:1])
        begins = len(text) + bool(characters.getstate()[0]) - bool(raw)  # the place of the character that its first byte is of
        text += characters.decode(raw[1:])
        if top is not None:
            tokens.append(describe(words, token, begins, logits_V, top))

    if echo:
        rows = repeat(None) if top is None else chain([None], score(decoder, prompt.ids))
        for token, logits_V in islice(zip(prompt.ids, rows, strict=False), prompt.hidden, None):
            add(token, logits_V)
        yield Piece(text, tokens)
        tokens = []
    begin = sent = len(text)
    for drawn, (token, logits_V) in enumerate(draw(decoder, prompt.ids, settings), 1):
        add(token, logits_V)
        cut = min((at for stop in stops if (at := text.find(stop, begin)) >= 0), default=None)
        if cut is not None:
            text, finish, tokens = text[:cut], "stop", [one for one in tokens if one.offset < cut]
            characters.reset()
            break
        if token == words.end_id:
            finish = "stop"
            break
        final = len(text) - held_back(text[begin:], stops)
        yield Piece(text[sent:final], [one for one in tokens if one.offset < final], drawn)
        sent, tokens = final, [one for one in tokens if one.offset >= final]
    text += characters.decode(b"", final=True)
    yield Piece(text[sent:], tokens, drawn, finish)


def held_back(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end of the text may be the beginning of a stop sequence."""
    return max((n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)


@torch.no_grad()
def score(decoder: Decoder, ids: Sequence[int]) -> Iterator[torch.Tensor]:
    """The logits, [V], of what follows each of the ids, read at once. Raises `ValueError` for more than the context."""
    decoder.reset()
    features_TW = decoder.features(torch.tensor([ids], device=decoder.device))[0]
    for part_TW in features_TW.split(ROWS):
        yield from decoder.head(part_TW).float().cpu()


def describe(words: Tokenizer, token: int, offset: int, logits_V: torch.Tensor | None, top: int) -> Token:
    if logits_V is None:
        return Token(spelling(words, token), offset, None, None)
    logprobs_V = logits_V.double().log_softmax(-1)
    best, ids = logprobs_V.topk(min(top, len(logprobs_V)))
    shown = dict(zip([*ids.tolist(), token], [*best.tolist(), float(logprobs_V[token])], strict=True))
    return Token(spelling(words, token), offset, shown[token], {spelling(words, one): value for one, value in shown.items()})


def spelling(words: Tokenizer, token: int) -> str:
    """A token as a text of its own: `bytes:\\xc3` where it is no whole characters, `<|endoftext|>` for the end of a document."""
    raw = words.decode([token])
    if not raw:
        return END_OF_TEXT if token == words.end_id else f"special:{token}"
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
