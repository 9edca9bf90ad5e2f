"""Text from a model, piece by piece as it comes."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from pathlib import Path

from stacklm.config.evaluate import Evaluate, Sample
from stacklm.data import DataError
from stacklm.data.tokenizer import Tokenizer
from stacklm.evaluate.generate import generate
from stacklm.model.cache import INPUTS, KEYS_AND_VALUES, Decoder
from stacklm.model.store import load_model
from stacklm.train.machine import prepare

CACHES = {"kv": KEYS_AND_VALUES, "x": INPUTS}


def stream(decoder: Decoder, words: Tokenizer, prompt: bytes | str, settings: Sample) -> Iterator[str]:
    """The text with which the model continues the prompt, taken as the start of a document, up to the document's end.

    A token's bytes may end inside a character: they are held back until it is whole. Bytes that are no UTF-8 become U+FFFD.
    """
    characters = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in generate(decoder, [words.end_id, *words.encode(prompt)], settings):
        if token == words.end_id:
            break
        yield characters.decode(words.decode([token]))
    if rest := characters.decode(b"", final=True):
        yield rest


def continue_text(config: Evaluate, trained: Path, tokenizer: Path, prompt: bytes | str, cache: str) -> Iterator[str]:
    """`stream` for the model in the folder `trained`, with `config.sample`; `cache` is one of `CACHES`.

    Raises `DataError` where model and tokenizer do not belong together, `ValueError` where that cache is not exact.
    """
    device = prepare(config.device, config.threads)
    model, settings = load_model(trained)
    words = Tokenizer.load(tokenizer)
    if words.vocab_size != settings.vocab_size:
        raise DataError(f"{trained} was trained with {settings.vocab_size} tokens, but {tokenizer} has {words.vocab_size}")
    decoder = Decoder(model.to(device).eval(), settings.context, CACHES[cache])
    return stream(decoder, words, prompt, config.sample)
