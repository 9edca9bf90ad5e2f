"""Text from a model: plain decoding, one full forward for each new token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from stacklm.config.evaluate import Sample


@torch.no_grad()
def generate(model: nn.Module, ids: Sequence[int], settings: Sample, context: int) -> Iterator[int]:
    """Yield `settings.tokens` ids that continue `ids`, each drawn given the up to `context` ids before it.

    The model should be in evaluation mode. Equal settings and weights give equal text: the draws have a seed of
    their own and are made on the CPU.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(settings.seed)
    ids = list(ids)
    for _ in range(settings.tokens):
        features_BTW = model.features(torch.tensor([ids[-context:]], device=device))
        logits_V = model.head(features_BTW[0, -1]).float().cpu()
        ids.append(choose(logits_V, settings.temperature, settings.top_k, generator))
        yield ids[-1]


def choose(logits_V: torch.Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    """Draw one id from the `top_k` likeliest (0: from all). Temperature 0 takes the likeliest."""
    if temperature == 0:
        return int(logits_V.argmax())
    best, ids = logits_V.topk(min(top_k or len(logits_V), len(logits_V)))
    probabilities = torch.softmax(best / temperature, dim=-1)
    return int(ids[torch.multinomial(probabilities, 1, generator=generator)])
