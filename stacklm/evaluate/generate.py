"""Token ids from a model, one after the other, each given those before it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from stacklm.config.evaluate import Sample
from stacklm.model.cache import Decoder


def generate(decoder: Decoder, ids: Sequence[int], settings: Sample) -> Iterator[int]:
    """Yield `settings.tokens` ids that continue `ids`, whose last ones are read, as many as the context holds.

    Where the context is full, the decoder forgets all and reads the later half again, so an id is drawn given at least
    half a context of ids before it. Equal settings and weights give equal ids: the draws have a seed of their own and
    are made on the CPU.
    """
    device = decoder.head.weight.device
    context = decoder.cache.context
    generator = torch.Generator().manual_seed(settings.seed)
    decoder.forget()
    window = list(ids[-context:])
    for _ in range(settings.tokens):
        if len(window) > context:
            decoder.forget()
            window = window[-max(context // 2, 1) :]
        unread = window[decoder.cache.tokens :]
        features_BTW = decoder.features(torch.tensor([unread], device=device))
        logits_V = decoder.head(features_BTW[0, -1]).float().cpu()
        window.append(choose(logits_V, settings, generator))
        yield window[-1]


def choose(logits_V: torch.Tensor, settings: Sample, generator: torch.Generator) -> int:
    """Draw one id. `temperature` divides the logits, and 0 takes the likeliest; `top_k` keeps so many (0: all).

    Of those, `top_p` keeps the fewest likeliest whose probabilities reach it (Holtzman et al. 2019, 1904.09751).
    """
    if settings.temperature == 0:
        return int(logits_V.argmax())
    best, ids = logits_V.double().topk(min(settings.top_k or len(logits_V), len(logits_V)))
    shares = torch.softmax(best / settings.temperature, dim=-1)
    likelier = shares.cumsum(dim=-1) - shares
    return int(ids[torch.multinomial(shares * (likelier < settings.top_p), 1, generator=generator)])
