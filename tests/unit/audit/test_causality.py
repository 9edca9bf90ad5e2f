"""Each check passes what is right and names what is wrong."""

import pytest
import torch
from torch import nn

from stacklm.audit import Fault
from stacklm.audit.causality import CHECKS, cached, context, finite, gradients, modes, pairs, past, prefix, rows
from stacklm.audit.probe import Probe
from stacklm.model.build import build
from stacklm.model.layers import LanguageModel
from support.audit_faults import (
    ARCHITECTURES,
    ATTENTION,
    CONTEXT,
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
    behind_the_embedding,
    made,
)

both_kinds = pytest.mark.parametrize("kind", ARCHITECTURES)


def probe(kind, plant=lambda model: None):
    return Probe(made(kind, plant), VOCAB, CONTEXT)


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


@both_kinds
def test_an_upper_triangular_mask_is_named(kind):
    found = probe(kind, MODEL_FAULTS["upper-triangular mask"])
    place = rf"in both modes; the first module to let them in is `{ATTENTION[kind]}` \(Backwards\)"
    with pytest.raises(Fault, match=rf"^upper-triangular mask: positions see later tokens and none before them; {place}"):
        pairs(found)
    with pytest.raises(
        Fault, match=r"^blind to the past: in training mode the logits at positions 1, 2, 3, 4, 5, 6, 7, 8 and 1 more ignore"
    ):
        past(found)
    with pytest.raises(Fault, match=r"^upper-triangular mask.*in the gradients of the losses"):
        gradients(found)


@both_kinds
@pytest.mark.parametrize(("fault", "mode"), [(f"mask missing in {mode} mode", mode) for mode in ("training", "evaluation")])
def test_a_mask_missing_in_one_mode_is_named(kind, fault, mode):
    found = probe(kind, MODEL_FAULTS[fault])
    place = rf"the first module to let them in is `{ATTENTION[kind]}` \(ForgetsItsMask\)"
    with pytest.raises(Fault, match=f"^no mask, or a normalisation over time: .*; in {mode} mode only; {place}"):
        pairs(found)
    with pytest.raises(Fault, match=r"differ at positions 0, 1, 2, 3, 4, 5, 6, 7 and 2 more, as where a mask is missing in one"):
        modes(found)


@both_kinds
def test_a_convolution_padded_off_by_one_is_named(kind):
    found = probe(kind, MODEL_FAULTS["convolution padded off by one"])
    place = r"the first module to let them in is `embedding_norm.1` \(OffByOne\)"
    with pytest.raises(Fault, match=rf"^off by 1: positions see 1 tokens ahead, as with a wrongly padded convolution.*{place}"):
        pairs(found)
    with pytest.raises(Fault, match=r"^off by 1: .*in the gradients"):
        gradients(found)
    with pytest.raises(Fault, match=r"^depends on the length: in a sequence cut to 1 tokens"):
        prefix(found)


@both_kinds
def test_a_normalisation_over_time_is_named(kind):
    found = probe(kind, MODEL_FAULTS["normalisation over time"])
    place = r"in both modes; the first module to let them in is `embedding_norm.1` \(NormOverTime\)"
    with pytest.raises(Fault, match=rf"^no mask, or a normalisation over time: every position sees all later tokens; {place}"):
        pairs(found)


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


@both_kinds
def test_a_leak_at_one_position_is_listed(kind):
    class Peek(nn.Module):
        def forward(self, x_BTC):
            return torch.cat([x_BTC[:, :4], x_BTC[:, 4:5] + x_BTC[:, 7:8], x_BTC[:, 5:]], dim=1) if x_BTC.shape[1] > 7 else x_BTC

    def plant(model):
        model.norm = nn.Sequential(model.norm, Peek())

    with pytest.raises(Fault, match=r"^a leak: the positions 4 see tokens after them; .*`norm.1` \(Peek\)"):
        pairs(probe(kind, plant))


@both_kinds
def test_a_leak_that_only_all_later_tokens_make_together_is_found(kind):
    class Majority(nn.Module):
        """Changes when more than half of what comes after position 2 does."""

        def forward(self, x_BTC):
            changed = (x_BTC[:, 3:, 0] != self.first[:, 3:]).sum(dim=1) if hasattr(self, "first") else 0
            self.first = x_BTC[:1, :, 0] if not hasattr(self, "first") else self.first
            bump = torch.zeros_like(x_BTC)
            bump[:, 2] = 1.0
            return x_BTC + bump * (torch.as_tensor(changed) > 3).float().view(-1, 1, 1)

    found = probe(kind)
    norm = found.model.embedding_norm
    found.model.embedding_norm = nn.Sequential(norm, Majority())
    with pytest.raises(Fault, match=r"see tokens after them|off by"):
        pairs(found)


@both_kinds
def test_positions_that_ignore_the_past_are_named(kind):
    found = probe(kind, attentions(OnlyItself))
    with pytest.raises(Fault, match=r"^blind to the past: in training mode .* 1, 2, 3, 4, 5, 6, 7, 8 and 1 more ignore all tokens"):
        past(found)
    with pytest.raises(Fault, match=r"^blind to the past: no earlier input has a gradient of the losses at positions 1, 2"):
        gradients(found)
    assert pairs(found)


@both_kinds
def test_rows_of_a_batch_that_mix_are_named(kind):
    with pytest.raises(Fault, match=r"^batch rows mix: in evaluation mode row 1 of 16 changes with the other rows"):
        rows(probe(kind, behind_the_embedding(Echo)))


@both_kinds
def test_a_leak_that_only_long_windows_have_is_named(kind):
    class LateLeak(nn.Module):
        """From position 40 on, sees one token ahead."""

        def forward(self, x_BTC):
            return torch.cat([x_BTC[:, :40], x_BTC[:, 40:] + x_BTC[:, 40:].roll(-1, dims=1)], dim=1)

    class LateGradient(torch.autograd.Function):
        """Right forwards and wrong backwards."""

        @staticmethod
        def forward(context, x_BTC):
            return x_BTC.clone()

        @staticmethod
        def backward(context, gradient_BTC):
            return LateLeak()(gradient_BTC.flip(1)).flip(1) if gradient_BTC.shape[1] > 40 else gradient_BTC

    model = build(ARCHITECTURES[kind], VOCAB, 64)
    assert context(Probe(model, VOCAB, 64)) == "63 cuts of 64 tokens, at every position, 16 at once"
    norm = model.embedding_norm
    model.embedding_norm = nn.Sequential(norm, LateLeak())
    assert pairs(Probe(model, VOCAB, 64))
    with pytest.raises(
        Fault, match=r"^a leak in a sequence of 64: in evaluation mode features at position 40 change with the tokens from 41 on"
    ):
        context(Probe(model, VOCAB, 64))
    norm.register_forward_hook(lambda module, inputs, outputs: LateGradient.apply(outputs))
    model.embedding_norm = norm
    with pytest.raises(
        Fault, match=r"^a leak in a sequence of 64: gradients of features before position \d+ reach the token at \d+"
    ):
        context(Probe(model, VOCAB, 64))


@both_kinds
def test_logits_that_depend_on_the_length_are_named(kind):
    def plant(model):
        model.norm = nn.Sequential(model.norm, Counted())

    found = probe(kind, plant)
    assert pairs(found)
    with pytest.raises(Fault, match=r"^depends on the length: in a sequence cut to 1 tokens, features are off by .e-01"):
        prefix(found)
    with pytest.raises(Fault, match=r"^cached decoding differs: with keys and values kept"):
        cached(found)


@both_kinds
def test_logits_that_are_no_numbers_are_named(kind):
    def plant(model):
        model.embedding.weight.data.fill_(torch.nan)

    with pytest.raises(Fault, match=r"^not finite: in training mode logits at positions 0, 1"):
        finite(probe(kind, plant))


def test_a_module_that_decoding_does_not_know_fails_the_cached_check():
    with pytest.raises(Fault, match=r"^cached decoding differs"):
        cached(probe("stacked", behind_the_embedding(lambda: nn.Sequential(NormOverTime()))))


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
    model = build(ARCHITECTURES["dense"], VOCAB, 4096)
    assert Probe(model, VOCAB, 4096).length == 32


@pytest.fixture(scope="module")
def long_probe():
    """Of a model that tests plant faults behind, one after the other."""
    found = probe_of_long()
    found.model.norm = nn.Sequential(found.model.norm, nn.Identity())
    return found


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


@pytest.mark.parametrize("which", [lambda changed_B: changed_B == 1, lambda changed_B: changed_B > 20], ids=["one", "all"])
def test_a_leak_of_one_token_alone_or_of_all_together_is_found(which):
    found = probe_of_long()
    found.model.embedding_norm = nn.Sequential(found.model.embedding_norm, CountsChanges(which))
    with pytest.raises(Fault, match=r"see tokens after them|off by"):
        pairs(found)


def probe_of_long():
    torch.manual_seed(0)
    return Probe(build(ARCHITECTURES["dense"], VOCAB, LONG), VOCAB, LONG)
