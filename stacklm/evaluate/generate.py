"""Text generation: autoregressive sampling of token ids, and streaming of their characters."""

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
    """Yield a continuation of the prompt, which is read as the start of a document, up to the document's end.

    If a token ends inside a character, its last bytes are held back until the character is complete. Bytes that are not UTF-8
    become U+FFFD.
    """
    characters = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in generate(decoder, [words.end_id, *words.encode(prompt)], settings):
        if token == words.end_id:
            break
        yield characters.decode(words.decode([token]))
    if rest := characters.decode(b"", final=True):
        yield rest


def continue_text(config: Evaluate, trained: Path, tokenizer: Path, prompt: bytes | str, cache: str) -> Iterator[str]:
    """Call `stream` for the model in the folder `trained`, with `config.sample`; `cache` is one of `CACHES`.

    Raises as `open_decoder` does.
    """
    decoder, words = open_decoder(config, trained, tokenizer, cache)
    return stream(decoder, words, prompt, config.sample)


def open_decoder(config: Evaluate, trained: Path, tokenizer: Path, cache: str = "kv") -> tuple[Decoder, Tokenizer]:
    """Return a decoder for the model in the folder `trained` on `config.device`, and its tokenizer; `cache` is one of `CACHES`.

    Raises `StoreError` if model and tokenizer do not belong together, `ValueError` if that cache is not exact for the model.
    """
    model, context, words = open_model(config, trained, tokenizer)
    return Decoder(model, context, CACHES[cache]), words


def open_model(config: Evaluate, trained: Path, tokenizer: Path) -> tuple[LanguageModel, int, Tokenizer]:
    """Return the model in the folder `trained`, in evaluation mode on `config.device`, its context length, and its tokenizer.

    Raises `StoreError` if model and tokenizer do not belong together.
    """
    device = setup_device(config.device, config.threads)
    words = Tokenizer.load(tokenizer)
    model, settings = load_model(trained, words.digest)
    return model.to(device).eval(), settings.context_length, words


def generate(decoder: Decoder, ids: Sequence[int], settings: Sample) -> Iterator[int]:
    """Yield `settings.max_new_tokens` ids that continue `ids`, of which only the last ones that fit into the context are read.

    When the context is full, the decoder drops its cache and recomputes the later half, so each id is sampled given at least
    half a context of ids. Equal settings and weights give equal ids: sampling has its own seed and runs on the CPU.
    """
    return (token for token, _ in draw(decoder, ids, settings))


def draw(decoder: Decoder, ids: Sequence[int], settings: Sample) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield the ids of `generate`, each with the logits, [V], from which it was sampled."""
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
    """Sample one id. `temperature` divides the logits, 0 takes the most likely id; `top_k` keeps the k most likely (0: all).

    Of those, `top_p` keeps the fewest most likely ids whose probabilities sum to at least p (Holtzman et al. 2019, 1904.09751).
    """
    if settings.temperature == 0:
        return int(logits_V.argmax())
    best, ids = logits_V.double().topk(min(settings.top_k or len(logits_V), len(logits_V)))
    shares = torch.softmax(best / settings.temperature, dim=-1)
    likelier = shares.cumsum(dim=-1) - shares
    return int(ids[torch.multinomial(shares * (likelier < settings.top_p), 1, generator=generator)])
