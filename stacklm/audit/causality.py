"""What a model's outputs and gradients depend on. The checks look only at what goes in and comes out: they hold for any model."""

from __future__ import annotations

from contextlib import suppress

import torch
import torch.nn.functional as F
from torch import Tensor

from stacklm.audit.certificate import Fault, claims
from stacklm.audit.probe import MODES, ROWS, Probe
from stacklm.model.cache import INPUTS, KEYS_AND_VALUES, Decoder, Leaves

CUTS = 16
"""Places at which a whole context is cut: kernels work in blocks, and most leaks of theirs are within one."""
TOLERANCE = 1e-4
"""Of the largest logit: for equal sums that are added in another order, far above rounding and far below a token's effect."""


@claims("all logits are finite numbers")
def finite(probe: Probe) -> str:
    for mode in MODES:
        wrong_T = ~probe.logits(probe.ids_T[None], mode)[0].isfinite().all(dim=-1)
        if wrong_T.any():
            raise Fault(f"not finite: in {mode} mode logits at positions {_listed(probe.position_T[wrong_T].tolist())}")
    return f"{probe.length} positions, in both modes"


@claims("no logit changes, to the last bit, with any token after its position")
def pairs(probe: Probe) -> str:
    leaks = {mode: sees_TT.triu(1) for mode, sees_TT in probe.sees.items() if sees_TT.triu(1).any()}
    for mode, leaks_TT in leaks.items():
        only = f"in {mode} mode only" if len(leaks) < len(MODES) else "in both modes"
        raise Fault(f"{pattern(leaks_TT, probe.sees[mode])}; {only}; the first module to let them in is {probe.entry(mode)}")
    return f"{probe.length * (probe.length - 1) // 2} pairs of {probe.length} positions, in both modes"


@claims("the logits at every position change when all tokens before it do")
def past(probe: Probe) -> str:
    earlier_TT = probe.position_T < probe.position_T[:, None]
    for mode in MODES:
        blind_T = ~probe.changed(earlier_TT, mode).diagonal()[1:]
        if blind_T.any():
            found = (probe.position_T[1:][blind_T]).tolist()
            raise Fault(f"blind to the past: in {mode} mode the logits at positions {_listed(found)} ignore all tokens before them")
    seen, pairs_ = (int(sees_TT.tril(-1).sum()) for sees_TT in (probe.sees["evaluation"], torch.ones_like(earlier_TT)))
    return f"{seen} of {pairs_} pairs of a position and one before it, token by token"


@claims("the loss at every position has gradients of exactly zero for later inputs and others for some earlier one")
def gradients(probe: Probe) -> str:
    reaches_TT = torch.cat([_reach(probe, rows) for rows in probe.position_T.split(ROWS)])
    if reaches_TT.triu(1).any():
        raise Fault(f"{pattern(reaches_TT.triu(1), reaches_TT)}, in the gradients of the losses")
    blind = [t for t in range(1, probe.length) if not reaches_TT[t, :t].any()]
    if blind:
        raise Fault(f"blind to the past: no earlier input has a gradient of the losses at positions {_listed(blind)}")
    return f"{int(reaches_TT.tril(-1).sum())} of {probe.length * (probe.length - 1) // 2} earlier inputs reached, no later one"


@claims("over the whole context, features before a cut do not change with the tokens after it, nor do their gradients reach them")
def context(probe: Probe) -> str:
    length = len(probe.whole)
    cuts = sorted({max(1, length * (2 * i + 1) // (2 * CUTS)) for i in range(CUTS)})
    place = torch.arange(length, device=probe.device)
    for mode in MODES:
        base = probe.features(probe.whole[None], mode)
        for cut in cuts:
            after = torch.where(place < cut, probe.whole, probe.other_whole)
            if not torch.equal(probe.features(after[None], mode)[:, :cut], base[:, :cut]):
                raise Fault(
                    f"a leak in a window of {length}: in {mode} mode features before position {cut} change with later tokens"
                )
    for cut in cuts:
        reached_1T = probe.gradients(probe.whole[None], lambda x_1TW, cut=cut: x_1TW[:, :cut].square().sum())
        if reached_1T[:, cut:].any():
            raise Fault(f"a leak in a window of {length}: gradients of features before position {cut} reach later tokens")
    return f"{len(cuts)} cuts of {length} tokens, in both modes"


@claims("the logits of a window cut short are those of the whole window")
def prefix(probe: Probe) -> str:
    whole_TV = probe.logits(probe.ids_T[None], "evaluation")[0]
    worst = 0.0
    for length in range(1, probe.length):
        off = _off(probe.logits(probe.ids_T[None, :length], "evaluation")[0], whole_TV)
        if not off <= TOLERANCE:
            raise Fault(f"depends on the length: in a window cut to {length} tokens, logits are off by {off:.0e} of the largest")
        worst = max(worst, off)
    return f"every length below {probe.length}, to {worst:.0e} of the largest logit"


@claims("decoding token by token from a cache gives the logits of the whole window")
def cached(probe: Probe) -> str:
    whole_TV = probe.logits(probe.ids_T[None], "evaluation")[0]
    worst = {"keys and values": _decoded(probe, whole_TV, KEYS_AND_VALUES, "keys and values")}
    with suppress(ValueError):  # where stack inputs are not enough, the decoder says so
        worst["stack inputs"] = _decoded(probe, whole_TV, INPUTS, "stack inputs")
    return " and ".join(f"{kind} to {difference:.0e}" for kind, difference in worst.items()) + " of the largest logit"


@claims("the logits of a window do not change, to the last bit, with the other windows of its batch")
def rows(probe: Probe) -> str:
    base_RT = probe.ids_T.repeat(ROWS, 1)
    for mode in MODES:
        whole = probe.logits(base_RT, mode)
        for row in range(ROWS):
            others_RT = torch.where(torch.arange(ROWS, device=probe.device)[:, None] == row, base_RT, probe.other_T)
            if not torch.equal(probe.logits(others_RT, mode)[row], whole[row]):
                raise Fault(f"batch rows mix: in {mode} mode row {row} of {ROWS} changes with the other rows")
    return f"each of {ROWS} rows, in both modes"


@claims("training and evaluation mode give the same logits, to the last bit, where dropout is off")
def modes(probe: Probe) -> str:
    first, second = (probe.logits(probe.ids_T[None], mode)[0] for mode in MODES)
    if not torch.equal(first, second):
        found = probe.position_T[(first != second).any(dim=-1)].tolist()
        raise Fault(f"training and evaluation mode differ at positions {_listed(found)}, as where a mask is missing in one")
    return f"{probe.length} positions"


CHECKS = (finite, pairs, past, gradients, context, prefix, cached, rows, modes)


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


def _reach(probe: Probe, rows: Tensor) -> Tensor:
    """Which inputs the losses at some positions have a gradient for, bool [R, T]; each loss has a row of the batch to itself."""

    def loss(x_RTW: Tensor) -> Tensor:
        logits_RV = probe.model.head(x_RTW[torch.arange(len(rows), device=rows.device), rows])
        return F.cross_entropy(logits_RV, probe.other_T[rows], reduction="sum")

    return probe.gradients(probe.ids_T.repeat(len(rows), 1), loss)


def _decoded(probe: Probe, whole_TV: Tensor, leaves: Leaves, kind: str) -> float:
    decoder = Decoder(probe.model.eval(), probe.length, leaves)
    with torch.no_grad():
        logits_TV = torch.cat([decoder.head(decoder.features(token)[0]) for token in probe.ids_T[None].split(1, dim=1)])
    off = _off(logits_TV, whole_TV)
    if not off <= TOLERANCE:
        raise Fault(f"cached decoding differs: with {kind} kept, logits are off by {off:.0e} of the largest")
    return off


def _off(part_TV: Tensor, whole_TV: Tensor) -> float:
    """By how much the logits of a window's beginning differ from those of the whole window, as a share of the largest."""
    return ((part_TV - whole_TV[: len(part_TV)]).abs().max() / whole_TV.abs().max()).item()


def _listed(positions: list[int]) -> str:
    shown = ", ".join(map(str, positions[:8]))
    return f"{shown} and {len(positions) - 8} more" if len(positions) > 8 else shown
