"""Text from a model: token ids, one after the other, each given those before it, and their characters as they come."""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from stacklm.config.evaluate import Evaluate, Sample
from stacklm.data.tokenizer import Tokenizer
from stacklm.model.cache import INPUTS, KEYS_AND_VALUES, Decoder
from stacklm.model.layers import LanguageModel
from stacklm.model.store import load_model
from stacklm.train.device import setup_device

CACHES = {"kv": KEYS_AND_VALUES, "inputs": INPUTS}


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

    Raises as `open_decoder` does.
    """
    decoder, words = open_decoder(config, trained, tokenizer, cache)
    return stream(decoder, words, prompt, config.sample)


def open_decoder(config: Evaluate, trained: Path, tokenizer: Path, cache: str = "kv") -> tuple[Decoder, Tokenizer]:
    """The model of the folder `trained`, ready to generate on `config.device`, and its tokenizer; `cache` is one of `CACHES`.

    Raises `StoreError` where model and tokenizer do not belong together, `ValueError` where that cache is not exact.
    """
    model, context, words = open_model(config, trained, tokenizer)
    return Decoder(model, context, CACHES[cache]), words


def open_model(config: Evaluate, trained: Path, tokenizer: Path) -> tuple[LanguageModel, int, Tokenizer]:
    """The model of the folder `trained` in evaluation mode on `config.device`, its context, and its tokenizer.

    Raises `StoreError` where model and tokenizer do not belong together.
    """
    device = setup_device(config.device, config.threads)
    words = Tokenizer.load(tokenizer)
    model, settings = load_model(trained, words.digest)
    return model.to(device).eval(), settings.context_length, words


def generate(decoder: Decoder, ids: Sequence[int], settings: Sample) -> Iterator[int]:
    """Yield `settings.max_new_tokens` ids that continue `ids`, whose last ones are read, as many as the context holds.

    Where the context is full, the decoder forgets all and reads the later half again, so an id is drawn given at least
    half a context of ids before it. Equal settings and weights give equal ids: the draws have a seed of their own and
    are made on the CPU.
    """
    return (token for token, _ in draw(decoder, ids, settings))


def draw(decoder: Decoder, ids: Sequence[int], settings: Sample) -> Iterator[tuple[int, torch.Tensor]]:
    """The ids of `generate`, each with the logits, [V], that it was drawn from."""
    device = decoder.device
    context = decoder.cache.context
    generator = torch.Generator().manual_seed(settings.seed)
    decoder.reset()
    window = list(ids[-context:])
    for _ in range(settings.max_new_tokens):
        if len(window) > context:
            decoder.reset()
            window = window[-max(context // 2, 1) :]
        unread = window[decoder.cache.tokens :]
        features_BTW = decoder.features(torch.tensor([unread], device=device))
        logits_V = decoder.head(features_BTW[0, -1]).detach().float().cpu()
        window.append(choose(logits_V, settings, generator))
        yield window[-1], logits_V


def choose(logits_V: torch.Tensor, settings: Sample, generator: torch.Generator) -> int:
    """Draw one id. `temperature` divides the logits, and 0 takes the most likely one; `top_k` keeps so many (0: all).

    Of those, `top_p` keeps the most likely ones whose probabilities reach it (Holtzman et al. 2019, 1904.09751).
    """
    if settings.temperature == 0:
        return int(logits_V.argmax())
    best, ids = logits_V.double().topk(min(settings.top_k or len(logits_V), len(logits_V)))
    shares = torch.softmax(best / settings.temperature, dim=-1)
    likelier = shares.cumsum(dim=-1) - shares
    return int(ids[torch.multinomial(shares * (likelier < settings.top_p), 1, generator=generator)])
