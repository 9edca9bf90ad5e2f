"""What a model's outputs and gradients depend on. The checks look only at what goes in and comes out: they hold for any model.

Dimension letters: R rows, U positions of a whole sequence, T positions of a short one, S of either, W features, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch
import torch.nn.functional as F
from torch import Tensor

from stacklm.audit import Fault
from stacklm.audit.probe import LONGEST, MODES, ROWS, Probe
from stacklm.model.cache import INPUTS, KEYS_AND_VALUES, Decoder, Replacements
from stacklm.model.custom import Custom
from stacklm.model.layers import LanguageModel
from stacklm.model.store import contents

TOLERANCE = 2**10 * torch.finfo(torch.float32).eps
"""Of the largest logit or feature: a thousand roundings, for equal sums that are added in another order."""
BLOCK = 16
"""Kernels work in blocks of a multiple of this: next to one, a shorter sequence takes another path through them."""


def finite(probe: Probe) -> str:
    """all features and logits are finite numbers"""
    rows, length = probe.whole_RU.shape
    for mode in MODES:
        x_RUW = probe.base(length, mode)
        with torch.no_grad():
            logits_UV = probe.model.head(x_RUW[0].float())
        wrong_U = ~(x_RUW.isfinite().all(dim=-1).all(dim=0) & logits_UV.isfinite().all(dim=-1))
        if wrong_U.any():
            raise Fault(f"not finite: in {mode} mode logits at positions {_places(wrong_U)}")
    return f"{rows} sequences of {length} tokens, in both modes"


def repeats(probe: Probe) -> str:
    """the same input gives the same features, to the last bit, whatever was computed in between"""
    rows, length = len(probe.whole_RU), probe.some
    for mode in MODES:
        base_RSW = probe.base(length, mode)
        probe.features(probe.other_RU[:, :length], mode)
        differs_S = (probe.features(probe.whole_RU[:, :length], mode) != base_RSW).any(dim=-1).any(dim=0)
        if differs_S.any():
            raise Fault(f"state between calls: in {mode} mode the same input has other features at positions {_places(differs_S)}")
    return f"{rows} sequences of {length} tokens, in both modes"


def pairs(probe: Probe) -> str:
    """no logit changes, to the last bit, with any token after its position"""
    leaks = {mode: sees_TT.triu(1) for mode, sees_TT in probe.sees.items() if sees_TT.triu(1).any()}
    for mode, leaks_TT in leaks.items():
        only = f"in {mode} mode only" if len(leaks) < len(MODES) else "in both modes"
        raise Fault(f"{pattern(leaks_TT, probe.sees[mode])}; {only}; the first module to let them in is {probe.entry(mode)}")
    return f"{probe.length * (probe.length - 1) // 2} pairs of {probe.length} positions, in both modes"


def past(probe: Probe) -> str:
    """the logits at every position change when all tokens before it do"""
    earlier_TT = probe.position_T < probe.position_T[:, None]
    for mode in probe.distinct:
        blind_T = ~probe.changed(earlier_TT, mode).diagonal()[1:]
        if blind_T.any():
            found = probe.position_T[1:][blind_T].tolist()
            raise Fault(f"blind to the past: in {mode} mode the logits at positions {_listed(found)} ignore all tokens before them")
    seen, pairs_ = (int(sees_TT.tril(-1).sum()) for sees_TT in (probe.sees["evaluation"], torch.ones_like(earlier_TT)))
    return f"{seen} of {pairs_} pairs of a position and one before it, token by token"


def gradients(probe: Probe) -> str:
    """the loss at every position has gradients of exactly zero for later inputs and others for some earlier one"""
    if not probe.sees_inputs:
        return "not to be told: no module looks the tokens up"
    reaches_TT = torch.cat([_reach(probe, rows) for rows in probe.position_T.split(ROWS)])
    if reaches_TT.triu(1).any():
        raise Fault(f"{pattern(reaches_TT.triu(1), reaches_TT)}, in the gradients of the losses")
    blind = [t for t in range(1, probe.length) if not reaches_TT[t, :t].any()]
    if blind:
        raise Fault(f"blind to the past: no earlier input has a gradient of the losses at positions {_listed(blind)}")
    return f"{int(reaches_TT.tril(-1).sum())} of {probe.length * (probe.length - 1) // 2} earlier inputs reached, no later one"


def context(probe: Probe) -> str:
    """over the whole context, features before a cut do not change with the tokens after it, nor do their gradients reach them"""
    rows, length = probe.whole_RU.shape
    where = f"a leak in a sequence of {length}:"
    after_RU = cuts_R = torch.empty(0)
    for cuts_R in _cuts(rows, length, probe.device):
        after_RU = torch.arange(length, device=probe.device) >= cuts_R[:, None]
        for mode in probe.modes:
            differs_RU = probe.differing(after_RU, ~after_RU, mode)
            if differs_RU.any():
                row, position = differs_RU.nonzero()[0].tolist()
                raise Fault(f"{where} in {mode} mode features at position {position} change with the tokens from {cuts_R[row]} on")
    reached_RU = probe.reached(after_RU, ~after_RU)  # for the last cuts alone, those at block borders
    if reached_RU.any():
        row, position = reached_RU.nonzero()[0].tolist()
        raise Fault(f"{where} gradients of features before position {cuts_R[row]} reach the token at {position}")
    return f"{length - 1} cuts of {length} tokens, at every position, {rows} at once"


def prefix(probe: Probe) -> str:
    """the features of a sequence cut short are those of the whole sequence"""
    length = probe.whole_RU.shape[1]
    whole_UW = probe.base(length, "evaluation")[0]
    shorter = [n for n in range(1, length) if n < LONGEST or n % BLOCK in (0, 1, BLOCK - 1) or n == length - 1]
    worst = 0.0
    for n in shorter:
        off = _off(probe.features(probe.whole_RU[:1, :n], "evaluation")[0], whole_UW)
        if not off <= TOLERANCE:
            raise Fault(f"depends on the length: in a sequence cut to {n} tokens, features are off by {off:.0e} of the largest")
        worst = max(worst, off)
    return f"{len(shorter)} lengths below {length}, to {worst:.0e} of the largest feature"


def cached(probe: Probe) -> str:
    """decoding token by token from a cache gives the logits of the whole sequence"""
    whole_TV = probe.logits(probe.ids_T[None], "evaluation")[0]
    kind = probe.model.keeps if isinstance(probe.model, Custom) else "keys and values"
    worst = {kind: _decoded(probe, whole_TV, KEYS_AND_VALUES, kind)}
    with suppress(ValueError):  # where stack inputs are not enough, the decoder says so
        worst["stack inputs"] = _decoded(probe, whole_TV, INPUTS, "stack inputs")
    return " and ".join(f"{kind} to {difference:.0e}" for kind, difference in worst.items()) + " of the largest logit"


def rebuilt(model: Custom, again: Callable[[], LanguageModel]) -> str:
    """a model built again with the same parameters and buffers gives the same logits: nothing else is held"""
    with torch.random.fork_rng():
        torch.manual_seed(1)  # what is drawn is drawn otherwise
        twin = again()
    own, theirs = contents(model), contents(twin)
    for name, tensor in theirs.items():
        if name not in own or own[name].shape != tensor.shape:
            raise Fault(f"holds more than its parameters: built again it has another {name}")
        tensor.data = own[name].detach().clone()
    device = next(model.parameters()).device
    ids_BT = torch.arange(2 * min(model.context, LONGEST), device=device).view(2, -1) % model.vocab_size
    with torch.no_grad():
        differs_T = (model.eval()(ids_BT) != twin.eval()(ids_BT)).any(dim=-1).any(dim=0)
    if differs_T.any():
        raise Fault(
            "holds more than its parameters and buffers: built again with these, it has other logits at positions "
            f"{_places(differs_T)}"
        )
    return f"2 sequences of {ids_BT.shape[1]} tokens"


def forward(model: Custom) -> str:
    """`forward` gives the logits that `head` makes of `features`"""
    ids_BT = torch.arange(min(model.context, LONGEST), device=next(model.parameters()).device)[None] % model.vocab_size
    with torch.no_grad():
        one_TV, two_TV = model.eval().whole(ids_BT)[0], model(ids_BT)[0]
    off = _off(two_TV, one_TV)
    if not off <= TOLERANCE:
        raise Fault(
            f"two answers: the logits of `forward` and those that `head` makes of `features` are {off:.0e} of the largest apart"
        )
    return f"{ids_BT.shape[1]} tokens, to {off:.0e} of the largest logit"


def rows(probe: Probe) -> str:
    """the features of a sequence do not change, to the last bit, with other sequences of its batch, nor do gradients reach them"""
    count, length = len(probe.whole_RU), probe.some
    row_R = torch.arange(count, device=probe.device)
    others_RS = torch.empty(0)
    for bit in range((count - 1).bit_length()):  # the numbers of two different rows differ in some bit
        for value in (0, 1):
            others_RS = ((row_R >> bit & 1) == value)[:, None].expand(count, length)
            for mode in probe.modes:
                differs_RS = probe.differing(others_RS, ~others_RS, mode)
                if differs_RS.any():
                    row = differs_RS.nonzero()[0, 0]
                    raise Fault(f"batch rows mix: in {mode} mode row {row} of {count} changes with the other rows")
    reached_RS = probe.reached(others_RS, ~others_RS)
    if reached_RS.any():
        raise Fault(f"batch rows mix: row {reached_RS.nonzero()[0, 0]} of {count} has gradients from the other rows")
    return f"{count} rows of {length} tokens, each beside every other"


def modes(probe: Probe) -> str:
    """training and evaluation mode give the same features, to the last bit, where dropout is off"""
    count, length = probe.whole_RU.shape
    if probe.random:
        return "training draws, as for dropout: with equal draws, both modes were tested everywhere"
    training_RUW, evaluation_RUW = (probe.base(length, mode) for mode in MODES)
    off = _off(training_RUW.flatten(0, 1), evaluation_RUW.flatten(0, 1))
    if isinstance(probe.model, Custom) and 0 < off <= TOLERANCE:
        return f"their kernels differ, by {off:.0e} of the largest feature: both modes were tested everywhere"
    differs_U = (training_RUW != evaluation_RUW).any(dim=-1).any(dim=0)
    if differs_U.any():
        raise Fault(f"training and evaluation mode differ at positions {_places(differs_U)}, as where a mask is missing in one")
    return f"{count} sequences of {length} tokens"


def threads(probe: Probe, count: int) -> str:
    """the features on as many threads as training has are those on one"""
    length = probe.whole_RU.shape[1]
    one_RUW = probe.base(length, "training")
    with on_threads(count):
        off = _off(probe.features(probe.whole_RU, "training").flatten(0, 1), one_RUW.flatten(0, 1))
    if not off <= TOLERANCE:
        raise Fault(f"depends on the threads: on {count} threads, features are off by {off:.0e} of the largest")
    return f"{count} threads, to {off:.0e} of the largest feature"


CHECKS = (finite, repeats, pairs, past, gradients, context, prefix, cached, rows, modes)
AS_TRAINED = (finite, repeats, context, rows)
"""Checks that run batches of one shape, if the probe has one: any other would be compiled again."""


@contextmanager
def on_threads(count: int) -> Iterator[None]:
    """Torch's operations are divided among that many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def pattern(leaks_TT: Tensor, sees_TT: Tensor) -> str:
    """The name of a leak, told by which positions see which."""
    length = len(leaks_TT)
    t, u = leaks_TT.nonzero(as_tuple=True)
    ahead = int((u - t).max())
    if not sees_TT.tril(-1).any():
        return "upper-triangular mask: positions see later tokens and none before them"
    if leaks_TT.sum() == length * (length - 1) // 2:
        return "no mask, or a normalisation over time: every position sees all later tokens"
    if ahead < length // 2 and len(t.unique()) >= length - ahead:
        return f"off by {ahead}: positions see {ahead} tokens ahead, as with a wrongly padded convolution or too wide a mask"
    return f"a leak: the positions {_listed(t.unique().tolist())} see tokens after them"


def _cuts(rows: int, length: int, device: torch.device) -> Iterator[Tensor]:
    """Batches of one cut per row, [R], spread over the context; those of the last batch are at block borders.

    The rows take other places in every batch, so that each row has cuts all over the context.
    """
    batches = math.ceil((length - 1) / rows)
    row_R = torch.arange(rows, device=device)
    for first in range(1, batches + 1):
        yield (first + batches * ((row_R + first * math.ceil(rows / batches)) % rows)).clamp(max=length - 1)


def _reach(probe: Probe, rows: Tensor) -> Tensor:
    """Which inputs the losses at some positions have a gradient for, bool [R, T]; each loss has a row of the batch to itself."""

    def loss(x_RTW: Tensor) -> Tensor:
        logits_RV = probe.model.head(x_RTW[torch.arange(len(rows), device=rows.device), rows])
        return F.cross_entropy(logits_RV, probe.other_T[rows], reduction="sum")

    return probe.gradients(probe.ids_T.repeat(len(rows), 1), loss)


def _decoded(probe: Probe, whole_TV: Tensor, replacements: Replacements, kind: str) -> float:
    decoder = Decoder(probe.model.eval(), probe.length, replacements)
    with torch.no_grad():
        logits_TV = torch.cat([decoder.head(decoder.features(token)[0]) for token in probe.ids_T[None].split(1, dim=1)])
    off = _off(logits_TV, whole_TV)
    if not off <= TOLERANCE:
        how = kind if isinstance(probe.model, Custom) else f"{kind} kept"
        raise Fault(f"cached decoding differs: with {how}, logits are off by {off:.0e} of the largest")
    return off


def _off(part_TW: Tensor, whole_TW: Tensor) -> float:
    """By how much logits or features of a sequence's beginning are off from those of the whole, as a share of the largest."""
    return ((part_TW - whole_TW[: len(part_TW)]).abs().max() / whole_TW.abs().max()).item()


def _places(found_T: Tensor) -> str:
    return _listed(found_T.nonzero().flatten().tolist())


def _listed(positions: list[int]) -> str:
    shown = ", ".join(map(str, positions[:8]))
    return f"{shown} and {len(positions) - 8} more" if len(positions) > 8 else shown
