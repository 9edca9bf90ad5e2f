"""A check that no position sees a later token, and that every position sees earlier ones.

It looks only at what goes in and what comes out, so it holds for any architecture. Changed tokens are compared, not NaNs
that spread: a correct softmax multiplies masked values by zero, and 0 * NaN is NaN.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

LONGEST = 32
"""Windows of this many tokens show a wrong mask as well as long ones do."""
ROWS = 8
"""Windows that are run at once: few, because a large vocabulary makes large logits."""


class CausalityError(AssertionError):
    """The model uses what it must not, or does not use what it may; the message names the positions."""


def check_causality(model: nn.Module, vocab_size: int, context: int) -> None:
    """Raise `CausalityError` unless, in training and in evaluation mode and for every position t,

    - the logits up to t are the same to the last bit when all tokens after t are replaced;
    - the logits at t change when all tokens before t are replaced.

    The window has min(`context`, 32) tokens. Dropout is off during the check. Parameters that are wholly zero, as output
    projections are at the start, would hide what lies before them and hold random values during it. The model leaves as it
    came, and torch's random state is not touched.
    """
    length = min(context, LONGEST)
    if length < 2 or vocab_size < 2:
        raise ValueError(f"causality needs at least 2 positions and 2 tokens to be seen, not {length} and {vocab_size}")
    generator = torch.Generator().manual_seed(0)
    ids_T = torch.randint(vocab_size, (length,), generator=generator)
    other_T = (ids_T + torch.randint(1, vocab_size, (length,), generator=generator)) % vocab_size
    position_T = torch.arange(length)
    cut_R1 = position_T[1:, None]  # one row a cut, between the positions before it and those from it on
    later_RT = torch.where(position_T >= cut_R1, other_T, ids_T)
    earlier_RT = torch.where(position_T < cut_R1, other_T, ids_T)
    with torch.no_grad(), _dropout_off(model), _zeros_filled(model, generator):
        for mode in ("training", "evaluation"):
            with _in_mode(model, training=mode == "training"):
                by_later_RT, by_earlier_RT = _changed(model, ids_T, torch.cat([later_RT, earlier_RT])).chunk(2)
            leaks_T = (by_later_RT & (position_T < cut_R1)).any(dim=0)
            if leaks_T.any():
                found = position_T[leaks_T].tolist()
                raise CausalityError(f"in {mode} mode the logits at positions {found} of {length} change with tokens after them")
            blind_R = ~by_earlier_RT.gather(1, cut_R1)[:, 0]
            if blind_R.any():
                found = position_T[1:][blind_R].tolist()
                raise CausalityError(f"in {mode} mode the logits at positions {found} of {length} ignore all tokens before them")


def _changed(model: nn.Module, ids_T: Tensor, variants_RT: Tensor) -> Tensor:
    """Where the logits of each variant differ from those of the unchanged window, bool [R, T].

    Both run in batches of the same shape and row, so that equal numbers are added in the same order.
    """
    device = next(model.parameters()).device
    rows = len(variants_RT)
    filled_RT = torch.cat([variants_RT, ids_T.expand(-rows % ROWS, -1)]).to(device)
    base = model(ids_T.expand(ROWS, -1).to(device))
    changed = [(model(batch) != base).any(dim=-1).cpu() for batch in filled_RT.split(ROWS)]
    return torch.cat(changed)[:rows]


@contextmanager
def _in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.train(training)
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def _dropout_off(model: nn.Module) -> Iterator[None]:
    rates = {module: module.p for module in model.modules() if isinstance(module, nn.Dropout)}
    for module in rates:
        module.p = 0.0
    try:
        yield
    finally:
        for module, rate in rates.items():
            module.p = rate


@contextmanager
def _zeros_filled(model: nn.Module, generator: torch.Generator) -> Iterator[None]:
    zeros = [parameter for parameter in model.parameters() if not parameter.any()]
    for parameter in zeros:
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    try:
        yield
    finally:
        for parameter in zeros:
            parameter.zero_()
