"""Each check passes correct models and names faults."""

import pytest
import torch
from torch import nn

from stacklm.audit import Fault
from stacklm.audit.causality import CHECKS, cached, context, finite, gradients, modes, pairs, past, prefix, rows
from stacklm.audit.probe import Probe
from stacklm.model.layers import LanguageModel
from support.audit_faults import (
    ARCHITECTURES,
    ATTENTION,
    CONTEXT,
    EMBEDDING,
    LONG,
    MODEL_FAULTS,
    VOCAB,
    Ahead,
    Counted,
    Echo,
    ForgetsItsMask,
    Hears,
    NormOverTime,
    OnlyItself,
    attentions,
    behind,
    made,
)

both_kinds = pytest.mark.parametrize("kind", ARCHITECTURES)


def probe(kind, plant=lambda model: None, length=CONTEXT):
    return Probe(made(kind, plant, length), VOCAB, length)


@both_kinds
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_shipped_architectures_pass(kind, check):
    assert check(probe(kind))


@both_kinds
def test_findings_are_measurements(kind):
    found = probe(kind)
    assert pairs(found) == "45 pairs of 10 positions, in both modes"
    assert past(found) == "45 of 45 pairs of a position and one before it, token by token"
    assert gradients(found) == "45 of 45 earlier inputs reached, no later one"
    assert context(found) == "9 cuts of 10 tokens, at every position, 16 at once"
    assert ("stack inputs" in cached(found)) is (kind == "stacked")


class Peek(nn.Module):
    """Position 4 sees position 7."""

    def forward(self, x_BTC):
        return torch.cat([x_BTC[:, :4], x_BTC[:, 4:5] + x_BTC[:, 7:8], x_BTC[:, 5:]], dim=1) if x_BTC.shape[1] > 7 else x_BTC


def without_numbers(model):
    model.embedding.weight.data.fill_(torch.nan)


PLANTED = {
    **MODEL_FAULTS,
    "a leak at one position": behind("norm", Peek),
    "no position sees another": attentions(OnlyItself),
    "rows that mix": behind(EMBEDDING, Echo),
    "features that depend on the length": behind("norm", Counted),
    "no numbers": without_numbers,
}
ENTRY = "the first module to let them in is"
NO_MASK = "no mask, or a normalisation over time: "
ALL_BUT_THE_FIRST = "positions 1, 2, 3, 4, 5, 6, 7, 8 and 1 more"
DIFFER = "training and evaluation mode differ at positions 0, 1, 2, 3, 4, 5, 6, 7 and 2 more, as where a mask is missing in one"
NAMES = {
    "upper-triangular mask": {
        pairs: rf"upper-triangular mask: positions see later tokens and none before them; in both modes; {ENTRY} `<attention>` "
        r"\(Backwards\)",
        past: f"blind to the past: in training mode the logits at {ALL_BUT_THE_FIRST} ignore all tokens",
        gradients: "upper-triangular mask.*in the gradients of the losses",
    },
    "mask missing in training mode": {
        pairs: rf"{NO_MASK}.*; in training mode only; {ENTRY} `<attention>` \(ForgetsItsMask\)",
        modes: DIFFER,
    },
    "mask missing in evaluation mode": {
        pairs: rf"{NO_MASK}.*; in evaluation mode only; {ENTRY} `<attention>` \(ForgetsItsMask\)",
        modes: DIFFER,
    },
    "convolution padded off by one": {
        pairs: rf"off by 1: positions see 1 tokens ahead, as with a wrongly padded convolution.*{ENTRY} `embedding_norm.1` "
        r"\(OffByOne\)",
        gradients: "off by 1: .*in the gradients",
        prefix: "depends on the length: in a sequence cut to 1 tokens",
    },
    "normalisation over time": {
        pairs: rf"{NO_MASK}every position sees all later tokens; in both modes; {ENTRY} `embedding_norm.1` \(NormOverTime\)",
    },
    "a leak at one position": {pairs: r"a leak: the positions 4 see tokens after them; .*`norm.1` \(Peek\)"},
    "no position sees another": {
        past: f"blind to the past: in training mode .* {ALL_BUT_THE_FIRST} ignore all tokens",
        gradients: "blind to the past: no earlier input has a gradient of the losses at positions 1, 2",
    },
    "rows that mix": {rows: "batch rows mix: in evaluation mode row 1 of 16 changes with the other rows"},
    "features that depend on the length": {
        prefix: "depends on the length: in a sequence cut to 1 tokens, features are off by .e-01",
        cached: "cached decoding differs: with keys and values kept",
    },
    "no numbers": {finite: "not finite: in training mode logits at positions 0, 1"},
}


@both_kinds
@pytest.mark.parametrize(
    ("fault", "check"),
    [pytest.param(fault, check, id=f"{fault}, by {check.__name__}") for fault in NAMES for check in NAMES[fault]],
)
def test_a_fault_is_named(kind, fault, check):
    with pytest.raises(Fault, match="^" + NAMES[fault][check].replace("<attention>", ATTENTION[kind])):
        check(probe(kind, PLANTED[fault]))


@both_kinds
@pytest.mark.parametrize("fault", ["no position sees another", "features that depend on the length"])
def test_what_sees_nothing_ahead_has_no_leak(kind, fault):
    assert pairs(probe(kind, PLANTED[fault]))


def test_a_leak_in_the_model_itself_is_put_down_to_it():
    class Rolled(LanguageModel):
        def __init__(self):
            super().__init__()
            self.model = made("dense")
            self.embedding, self.head, self.features = self.model.embedding, self.model.head, self.model.features

        def forward(self, ids_BT):
            return self.model(ids_BT) + self.model(ids_BT).roll(-3, dims=1)

    with pytest.raises(Fault, match=r"^off by 3: .*; in both modes; the first module to let them in is Rolled$"):
        pairs(Probe(Rolled(), VOCAB, CONTEXT))


def test_a_module_that_decoding_does_not_know_fails_the_cached_check():
    with pytest.raises(Fault, match=r"^cached decoding differs"):
        cached(probe("stacked", behind(EMBEDDING, NormOverTime)))


def test_dropout_is_off_and_zeros_are_filled():
    found = probe("dense", attentions(lambda attention: ForgetsItsMask(attention, in_training=True)))
    assert all(parameter.any() for parameter in found.model.parameters())
    with pytest.raises(Fault):  # the output projection of attention was zero and would have hidden it
        pairs(found)
    assert {module.p for module in probe("stacked").model.modules() if isinstance(module, nn.Dropout)} == {0.0}


@pytest.mark.parametrize(("vocab_size", "context"), [(VOCAB, 1), (1, CONTEXT)])
def test_nothing_can_be_seen_with_one_position_or_token(vocab_size, context):
    with pytest.raises(ValueError, match=r"at least 2 positions and 2 tokens"):
        Probe(made("dense"), vocab_size, context)


def test_long_contexts_are_cut():
    assert probe("dense", length=4096).length == 32


@pytest.fixture(scope="module")
def long_probe():
    """Of a model that tests plant faults behind, one after the other."""
    return probe("dense", behind("norm", nn.Identity), LONG)


def planted(probe, fault):
    probe.model.norm[1] = fault
    probe._base.clear()
    return probe


@pytest.mark.parametrize("position", [0, 1, 2, 8, 14, 15, 16, 29, 31, 32, 37, 45, 46])
def test_a_leak_at_any_one_position_is_found(long_probe, position):
    found = planted(long_probe, Ahead(1e-3, lambda position_T: position_T == position))
    with pytest.raises(Fault, match=rf"features at position {position} change with the tokens from {position + 1} on"):
        context(found)


class Reverse(torch.autograd.Function):
    """Right forwards; backwards it lets a later position into an earlier one's gradients."""

    @staticmethod
    def forward(context, x_BTC):
        return x_BTC.clone()

    @staticmethod
    def backward(context, gradient_BTC):
        return gradient_BTC + gradient_BTC.roll(1, dims=1 if gradient_BTC.shape[1] == LONG else 0)


class WrongBackwards(nn.Module):
    def forward(self, x_BTC):
        return Reverse.apply(x_BTC)


@pytest.mark.parametrize(("check", "name"), [(context, "gradients of features before position"), (rows, "has gradients from the")])
def test_a_leak_in_the_gradients_alone_is_found(long_probe, check, name):
    with pytest.raises(Fault, match=name):
        check(planted(long_probe, WrongBackwards()))


@pytest.mark.parametrize(("row", "other"), [(1, 0), (0, 1), (2, 0), (0, 4), (8, 0), (15, 7), (6, 5)])
def test_any_row_that_hears_any_other_is_found(long_probe, row, other):
    with pytest.raises(Fault, match=f"in evaluation mode row {row} of 16 changes with the other rows"):
        rows(planted(long_probe, Hears(row, other)))


class ShortWindows(nn.Module):
    """A thousandth more in sequences of one length."""

    def __init__(self, length):
        super().__init__()
        self.length = length

    def forward(self, x_BTC):
        return x_BTC * 1.001 if x_BTC.shape[1] == self.length else x_BTC


@pytest.mark.parametrize("length", [1, 2, 7, 15, 23, 31, 32, 33, 47])
def test_a_thousandth_at_any_one_length_is_found(long_probe, length):
    with pytest.raises(Fault, match=rf"in a sequence cut to {length} tokens, features are off by \de-0[34] of the largest"):
        prefix(planted(long_probe, ShortWindows(length)))


def test_a_thousandth_in_decoding_is_found(long_probe):
    with pytest.raises(Fault, match=r"with keys and values kept, logits are off by \de-0[34] of the largest"):
        cached(planted(long_probe, ShortWindows(1)))


class CountsChanges(nn.Module):
    """Position 2 sees how many of the tokens behind it are others than in the first sequence."""

    def __init__(self, which):
        super().__init__()
        self.which = which

    def forward(self, x_BTC):
        if not hasattr(self, "first"):
            self.first = x_BTC[:1, :, 0]
        changed_B = (x_BTC[:, 3:, 0] != self.first[:, 3 : x_BTC.shape[1]]).sum(dim=1)
        bump_BTC = torch.zeros_like(x_BTC)
        bump_BTC[:, 2] = self.which(changed_B)[:, None].float()
        return x_BTC + bump_BTC


@pytest.mark.parametrize(
    ("kind", "length", "which"),
    [
        ("dense", CONTEXT, lambda changed_B: changed_B > 3),
        ("stacked", CONTEXT, lambda changed_B: changed_B > 3),
        ("dense", LONG, lambda changed_B: changed_B == 1),
        ("dense", LONG, lambda changed_B: changed_B > 20),
    ],
    ids=["most", "most, stacked", "one", "all"],
)
def test_a_leak_of_one_token_alone_or_of_many_together_is_found(kind, length, which):
    found = probe(kind, length=length)
    behind(EMBEDDING, lambda: CountsChanges(which))(found.model)
    with pytest.raises(Fault, match=r"see tokens after them|off by"):
        pairs(found)


@both_kinds
def test_a_leak_that_only_long_windows_have_is_named(kind):
    model = made(kind, context=LONG)
    assert context(Probe(model, VOCAB, LONG)) == "47 cuts of 48 tokens, at every position, 16 at once"
    norm = model.embedding_norm
    model.embedding_norm = nn.Sequential(norm, Ahead(positions=lambda position_T: position_T >= 42))
    assert pairs(Probe(model, VOCAB, LONG))
    where = "^a leak in a sequence of 48: "
    with pytest.raises(Fault, match=rf"{where}in evaluation mode features at position 42 change with the tokens from 43 on"):
        context(Probe(model, VOCAB, LONG))
    model.embedding_norm = nn.Sequential(norm, WrongBackwards())
    with pytest.raises(Fault, match=rf"{where}gradients of features before position \d+ reach the token at \d+"):
        context(Probe(model, VOCAB, LONG))
