"""A model in a state in which it can be looked at: what changes in its outputs when tokens change."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn

LONGEST = 32
"""Tokens of the window in which every pair of positions is looked at."""
ROWS = 8
"""Windows that are run at once: few, because a large vocabulary makes large logits."""
MODES = {"training": True, "evaluation": False}


class Call(NamedTuple):
    """A module at work: what went in and came out at the positions before a cut."""

    name: str
    inputs: list[Tensor]
    outputs: list[Tensor]


class Probe:
    """A model that is taken over, tokens for its whole context, another one for each of their places, and a window of T of them.

    Its dropout is turned off. Parameters that are wholly zero, as output projections are at the start, would hide what lies
    before them: they get random values. Tokens are changed rather than made NaN, because a correct softmax multiplies
    masked values by zero, and 0 * NaN is NaN. Raises `ValueError` where there is no second position or token to see.
    """

    def __init__(self, model: nn.Module, vocab_size: int, context: int) -> None:
        self.length = min(context, LONGEST)
        if self.length < 2 or vocab_size < 2:
            raise ValueError(f"an audit needs at least 2 positions and 2 tokens, not {self.length} and {vocab_size}")
        generator = torch.Generator().manual_seed(0)
        self.device = next(model.parameters()).device
        self.model = model
        self._prepare(generator)
        ids = torch.randint(vocab_size, (context,), generator=generator)
        other = (ids + torch.randint(1, vocab_size, (context,), generator=generator)) % vocab_size
        self.whole, self.other_whole = ids.to(self.device), other.to(self.device)
        self.ids_T, self.other_T = self.whole[: self.length], self.other_whole[: self.length]
        self.position_T = torch.arange(self.length, device=self.device)

    def _prepare(self, generator: torch.Generator) -> None:
        for module in self.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        with torch.no_grad():
            for parameter in self.model.parameters():
                if not parameter.any():
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)

    @torch.no_grad()
    def features(self, ids_BT: Tensor, mode: str) -> Tensor:
        """Features [B, T, W] of windows."""
        return self.model.train(MODES[mode]).features(ids_BT)

    @torch.no_grad()
    def logits(self, ids_RT: Tensor, mode: str) -> Tensor:
        """Logits [R, T, V] of windows, all at once."""
        return self.model.train(MODES[mode])(ids_RT)

    def gradients(self, ids_BT: Tensor, objective: Callable[[Tensor], Tensor]) -> Tensor:
        """Where a number made of the features, in training mode, has gradients for the embedded inputs, bool [B, T]."""
        inputs: list[Tensor] = []

        def leaf(module: nn.Module, arguments: object, x_BTC: Tensor) -> Tensor:
            inputs.append(x_BTC.detach().requires_grad_())
            return inputs[-1]

        hook = self.model.embedding.register_forward_hook(leaf)
        try:
            value = objective(self.model.train().features(ids_BT))
        finally:
            hook.remove()
        (gradient_BTC,) = torch.autograd.grad(value, inputs)
        return (gradient_BTC != 0).any(dim=-1)

    def changed(self, places_RT: Tensor, mode: str) -> Tensor:
        """Where logits differ to the bit from those of the window when its tokens at the given places are others, bool [R, T].

        Both run in batches of the same shape and in the same row, so that equal numbers are added in the same order.
        """
        variants_RT = torch.where(places_RT, self.other_T, self.ids_T)
        rows = len(variants_RT)
        filled_RT = torch.cat([variants_RT, self.ids_T.expand(-rows % ROWS, -1)])
        base = self.logits(self.ids_T.repeat(ROWS, 1), mode)
        return torch.cat([(self.logits(batch, mode) != base).any(dim=-1) for batch in filled_RT.split(ROWS)])[:rows]

    @cached_property
    def sees(self) -> dict[str, Tensor]:
        """By mode, bool [T, T]: whether the logits at position t change with the token at u.

        A change that only all later tokens together make is put down to the next one.
        """
        one_TT = torch.eye(self.length, dtype=torch.bool, device=self.device)
        later_TT = self.position_T > self.position_T[:, None]
        found = {}
        for mode in MODES:
            by_one, by_later = self.changed(torch.cat([one_TT, later_TT]), mode).split(self.length)
            found[mode] = by_one.T.clone()
            found[mode].diagonal(1).logical_or_(by_later.diagonal()[:-1])
        return found

    def entry(self, mode: str) -> str:
        """The innermost module that lets later tokens in: what goes into it does not depend on them and what comes out does."""
        cut = self.length // 2
        with self._recorded(cut) as calls:
            self.logits(self.ids_T[None], mode)
        with self._recorded(cut) as calls_with_others:
            self.logits(torch.where(self.position_T < cut, self.ids_T, self.other_T)[None], mode)
        for one, other in zip(calls, calls_with_others, strict=True):
            if _equal(one.inputs, other.inputs) and not _equal(one.outputs, other.outputs):
                kind = type(self.model.get_submodule(one.name)).__name__
                return f"`{one.name}` ({kind})" if one.name else kind
        return "not to be told"

    @contextmanager
    def _recorded(self, cut: int) -> Iterator[list[Call]]:
        """The calls of all modules, in the order in which they end."""
        calls: list[Call] = []

        def early(values: object) -> list[Tensor]:
            if isinstance(values, Tensor):
                return [values[:, :cut].clone()] if values.shape[:2] == (1, self.length) else []
            return [tensor for value in values for tensor in early(value)] if isinstance(values, (tuple, list)) else []

        def recorder(name: str):
            return lambda module, inputs, outputs: calls.append(Call(name, early(inputs), early(outputs)))

        hooks = [module.register_forward_hook(recorder(name)) for name, module in self.model.named_modules()]
        try:
            yield calls
        finally:
            for hook in hooks:
                hook.remove()


def _equal(some: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))
