"""A model in a state in which it can be tested: what changes in its outputs when tokens change.

Dimension letters: R rows, U positions of a whole sequence, T positions of a short one, S of either, B batch, C width of the
embedding, W features, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from stacklm.model.custom import Custom
from stacklm.model.layers import LanguageModel
from stacklm.train.loss import Arithmetic

LONGEST = 32
"""Tokens of the short sequence, in which every pair of positions is tested."""
ROWS = 8
"""Short sequences that are run at once: few, because a large vocabulary makes large logits."""
TOKENS = 2048
"""Tokens of the batches of whole sequences; never fewer than two sequences."""
MODES = {"training": True, "evaluation": False}


class Call(NamedTuple):
    """One call of a module: its inputs and outputs at the positions before a cut."""

    name: str
    inputs: list[Tensor]
    outputs: list[Tensor]


class Marked(nn.Module):
    """An embedding with a `mark` of zeros [B, T, C] added to its output, if there is one: gradients of the mark are the output's.

    A module and not a hook, because compiled code does not see hooks.
    """

    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        self.embedding = embedding
        self.mark: Tensor | None = None

    def forward(self, ids_BT: Tensor) -> Tensor:
        x_BTC = self.embedding(ids_BT)
        return x_BTC if self.mark is None or self.mark.shape != x_BTC.shape else x_BTC + self.mark

    def __getattr__(self, name: str) -> Any:
        """What is asked of the embedding, such as its weight."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("embedding"), name)


class Probe:
    """A model that is taken over, with two batches of R sequences of the whole context that differ in every token.

    A short sequence of T tokens is the beginning of the first. Training mode computes as training does: with gradients, and
    inside a context `arithmetic()`; evaluation mode as validation does, without either. Cuts and rows are tried in `modes`:
    one is enough where the check `modes` finds both equal. With `rows` all batches of sequences have the one shape of that
    many sequences of the whole context, for code that is compiled for it.

    Dropout is turned off. Parameters that are all zero, as output projections are at the start, would hide what lies before
    them: they get random values. Tokens are changed rather than made NaN, because a correct softmax multiplies masked values
    by zero, and 0 * NaN is NaN. Raises `ValueError` where there is no second position or token to see.
    """

    def __init__(
        self,
        model: LanguageModel,
        vocab_size: int,
        context: int,
        arithmetic: Arithmetic = nullcontext,
        modes: tuple[str, ...] = ("evaluation",),
        rows: int = 0,
    ) -> None:
        self.length = min(context, LONGEST)
        if self.length < 2 or vocab_size < 2:
            raise ValueError(f"an audit needs at least 2 positions and 2 tokens, not {self.length} and {vocab_size}")
        generator = torch.Generator().manual_seed(0)
        self.model, self.arithmetic, self.modes = model, arithmetic, modes
        self.device = next(model.parameters()).device
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            elif isinstance(module, (nn.RNNBase, nn.MultiheadAttention)):
                module.dropout = 0.0
        with torch.no_grad():
            for parameter in model.parameters():
                if not parameter.any():
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
        shape = rows or max(2, min(2 * ROWS, TOKENS // context)), context
        ids = torch.randint(vocab_size, shape, generator=generator)
        other = (ids + torch.randint(1, vocab_size, shape, generator=generator)) % vocab_size
        self.whole_RU, self.other_RU = ids.to(self.device), other.to(self.device)
        self.some = context if rows else self.length
        self._base: dict[tuple[int, str], Tensor] = {}
        self.ids_T, self.other_T = self.whole_RU[0, : self.length], self.other_RU[0, : self.length]
        self.position_T = torch.arange(self.length, device=self.device)
        self._marked = [self._mark(name) for name in self._lookups()]
        self.random = False
        if isinstance(model, Custom):
            self._compare_modes()

    @property
    def sees_inputs(self) -> bool:
        """Whether gradients of the inputs can be looked at: some module looks the tokens up."""
        return bool(self._marked)

    def _compare_modes(self) -> None:
        """Where training mode is random in spite of all that was turned off, make its draws the same for every batch, so that what
        is left depends on the tokens alone. Where the modes differ, if only by the kernels that they use, try all in both."""
        drawn = []
        for seed in (0, 1):
            with self._seeded(seed):
                drawn.append(self._trained(self.whole_RU)[0].detach())
        self.random = not torch.equal(*drawn)
        if len(self.distinct) > 1:
            self.modes = tuple(MODES)

    @contextmanager
    def _seeded(self, seed: int = 0) -> Iterator[None]:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            yield

    def _lookups(self) -> list[str]:
        """The names of the modules that turn the tokens into vectors."""
        ids_BT = self.whole_RU[:, : self.length]
        found: list[str] = []

        def note(name: str, module: nn.Module, inputs: tuple, output: Any) -> None:
            looks_up = inputs and isinstance(inputs[0], Tensor) and torch.equal(inputs[0], ids_BT)
            if looks_up and isinstance(output, Tensor) and output.ndim == 3 and output.requires_grad and name not in found:
                found.append(name)

        leaves = [(name, module) for name, module in self.model.named_modules() if not any(True for _ in module.children())]
        hooks = [module.register_forward_hook(partial(note, name)) for name, module in leaves]
        try:
            self.model.eval().features(ids_BT)
        finally:
            for hook in hooks:
                hook.remove()
        return found

    def _mark(self, name: str) -> Marked:
        owner, _, own = name.rpartition(".")
        marked = Marked(self.model.get_submodule(name))
        self.model.get_submodule(owner).register_module(own, marked)
        return marked

    def features(self, ids_BT: Tensor, mode: str) -> Tensor:
        """Features [B, T, W] of sequences."""
        if mode == "training":
            return self._trained(ids_BT)[0].detach()
        with torch.no_grad():
            return self.model.eval().features(ids_BT)

    @torch.no_grad()
    def logits(self, ids_BT: Tensor, mode: str) -> Tensor:
        """Logits [B, T, V] of sequences, all at once."""
        with self.arithmetic() if MODES[mode] else nullcontext(), self._seeded() if self.random else nullcontext():
            return self.model.train(MODES[mode])(ids_BT)

    def gradients(self, ids_BT: Tensor, objective: Callable[[Tensor], Tensor]) -> Tensor:
        """Where a number made of the features, in training mode, has gradients for the embedded inputs, bool [B, T]."""
        features_BTW, marks = self._trained(ids_BT)
        reached_BT = torch.zeros_like(ids_BT, dtype=torch.bool)
        if marks:
            for gradient_BTC in torch.autograd.grad(objective(features_BTW), marks, allow_unused=True):
                if gradient_BTC is not None:
                    reached_BT |= (gradient_BTC != 0).any(dim=-1)
        return reached_BT

    def _trained(self, ids_BT: Tensor) -> tuple[Tensor, list[Tensor]]:
        for marked in self._marked:
            weight = next(marked.parameters())
            marked.mark = weight.new_zeros(*ids_BT.shape, weight.shape[-1]).requires_grad_()
        try:
            with self.arithmetic(), self._seeded() if self.random else nullcontext():
                return self.model.train().features(ids_BT), [marked.mark for marked in self._marked if marked.mark is not None]
        finally:
            for marked in self._marked:
                marked.mark = None

    @cached_property
    def distinct(self) -> tuple[str, ...]:
        """The modes, or the first alone where both give the same features of the whole sequences: what one sees the other does."""
        training, evaluation = (self.base(self.whole_RU.shape[1], mode) for mode in MODES)
        return tuple(MODES)[: 1 if torch.equal(training, evaluation) else 2]

    def base(self, length: int, mode: str) -> Tensor:
        """The features [R, S, W] of the first S tokens of the whole sequences."""
        if (length, mode) not in self._base:
            self._base[length, mode] = self.features(self.whole_RU[:, :length], mode)
        return self._base[length, mode]

    def differing(self, changed_RS: Tensor, kept_RS: Tensor, mode: str) -> Tensor:
        """Where features at positions to be kept differ to the bit when some tokens of the sequences are others, bool [R, S]."""
        length = changed_RS.shape[1]
        ids_RS = torch.where(changed_RS, self.other_RU[:, :length], self.whole_RU[:, :length])
        return (self.features(ids_RS, mode) != self.base(length, mode)).any(dim=-1) & kept_RS

    def reached(self, changed_RS: Tensor, kept_RS: Tensor) -> Tensor:
        """Which of some tokens of the sequences have gradients from the features at positions to be kept, bool [R, S]."""
        ids_RS = self.whole_RU[:, : changed_RS.shape[1]]
        return self.gradients(ids_RS, lambda x_RSW: x_RSW[kept_RS].float().square().sum()) & changed_RS

    def changed(self, places_RT: Tensor, mode: str) -> Tensor:
        """Where logits differ to the bit from those of the sequence when its tokens at the given places are others, bool [R, T].

        Both run in batches of the same shape and in the same row, so that equal numbers are added in the same order.
        """
        variants_RT = torch.where(places_RT, self.other_T, self.ids_T)
        count = len(variants_RT)
        filled_RT = torch.cat([variants_RT, self.ids_T.expand(-count % ROWS, -1)])
        base = self.logits(self.ids_T.repeat(ROWS, 1), mode)
        return torch.cat([(self.logits(batch, mode) != base).any(dim=-1) for batch in filled_RT.split(ROWS)])[:count]

    @cached_property
    def sees(self) -> dict[str, Tensor]:
        """By mode, bool [T, T]: whether the logits at position t change with the token at u.

        A change that only all later tokens together make is attributed to the next one.
        """
        one_TT = torch.eye(self.length, dtype=torch.bool, device=self.device)
        later_TT = self.position_T > self.position_T[:, None]
        found = {}
        for mode in self.distinct:
            by_one, by_later = self.changed(torch.cat([one_TT, later_TT]), mode).split(self.length)
            found[mode] = by_one.T.clone()
            found[mode].diagonal(1).logical_or_(by_later.diagonal()[:-1])
        return {mode: found.get(mode, found[self.distinct[0]]) for mode in MODES}

    def entry(self, mode: str) -> str:
        """The innermost module that lets later tokens in: what goes into it does not depend on them and what comes out does."""
        cut = self.length // 2
        cut_T = torch.where(self.position_T < cut, self.ids_T, self.other_T)
        one, other = (self._calls(ids_T, cut, mode) for ids_T in (self.ids_T, cut_T))
        for call, changed in zip(one, other, strict=False):
            if call.name != changed.name:
                break  # what runs depends on the tokens
            if _equal(call.inputs, changed.inputs) and not _equal(call.outputs, changed.outputs):
                kind = type(self.model.get_submodule(call.name)).__name__
                name = f"{call.name}.".removeprefix(self.model.prefix).removesuffix(".")
                return f"`{name}` ({kind})" if name else kind
        return "not to be told"

    def _calls(self, ids_T: Tensor, cut: int, mode: str) -> list[Call]:
        """The calls of all modules, in the order in which they end."""
        calls: list[Call] = []

        def early(values: Any) -> list[Tensor]:
            if isinstance(values, Tensor):
                if values.shape[:2] == (1, self.length):
                    return [values[:, :cut].clone()]
                return [values[:cut].clone()] if values.shape[:2] == (self.length, 1) else []
            if isinstance(values, Mapping):
                return early(list(values.values()))
            return [tensor for value in values for tensor in early(value)] if isinstance(values, (tuple, list)) else []

        def record(name: str, module: nn.Module, inputs: Any, named: Any, outputs: Any) -> None:
            calls.append(Call(name, early([inputs, named]), early(outputs)))

        named = self.model.named_modules()
        hooks = [module.register_forward_hook(partial(record, name), with_kwargs=True) for name, module in named]
        try:
            self.logits(ids_T[None], mode)
        finally:
            for hook in hooks:
                hook.remove()
        return calls


def _equal(some: list[Tensor], others: list[Tensor]) -> bool:
    return len(some) == len(others) and all(torch.equal(a, b) for a, b in zip(some, others, strict=True))
