"""One completion: its text, streamed up to a stop sequence, and its tokens with log-probabilities.

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
"""Maximum number of positions whose logits are in memory at once."""


class Prompt(NamedTuple):
    """Token ids of a prompt; the first `hidden` are not echoed. A text starts a document: an end token precedes it."""

    ids: list[int]
    hidden: int


class Token(NamedTuple):
    """A token's spelling, the offset of its first character in the text, and its log-probability (None if nothing precedes it).

    `top` maps the most likely tokens at this position, by spelling, and this token to their log-probabilities.
    """

    text: str
    offset: int
    logprob: float | None
    top: dict[str, float] | None


class Piece(NamedTuple):
    """The next part of a completion: final characters, the tokens that start in them, number of tokens sampled so far."""

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
    """Yield the text of `stacklm.evaluate.generate.stream`, up to the first of `stops`, as one piece per token and a last one.

    `echo` puts the prompt before it. With `top`, pieces contain tokens, including the one that ends the document, each with the
    `top` most likely at its position: the model's probabilities, before temperature, `top_k` and `top_p`.
    """
    characters = codecs.getincrementaldecoder("utf-8")(errors="replace")
    text, tokens, drawn, finish = "", [], 0, "length"

    def add(token: int, logits_V: torch.Tensor | None) -> None:
        nonlocal text
        raw = words.decode([token])
        text += characters.decode(raw[:1])
        begins = len(text) + bool(characters.getstate()[0]) - bool(raw)  # offset of the character that its first byte belongs to
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
    """Return how many characters at the end of the text may be the start of a stop sequence."""
    return max((n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)


@torch.no_grad()
def score(decoder: Decoder, ids: Sequence[int]) -> Iterator[torch.Tensor]:
    """Yield next-token logits, [V], for each id, from one forward pass. Raises `ValueError` for more ids than the context."""
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
    """Return a token as text: `bytes:\\xc3` if it is not whole characters, `<|endoftext|>` for the end of a document."""
    raw = words.decode([token])
    if not raw:
        return END_OF_TEXT if token == words.end_id else f"special:{token}"
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
