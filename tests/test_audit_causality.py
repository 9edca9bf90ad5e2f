"""Each check passes what is right and names what is wrong."""

import pytest
import torch
from audit_faults import (
    ARCHITECTURES,
    ATTENTION,
    CONTEXT,
    MODEL_FAULTS,
    VOCAB,
    Counted,
    Echo,
    ForgetsItsMask,
    NormOverTime,
    OnlyItself,
    attentions,
    behind_the_embedding,
    made,
)
from torch import nn

from stacklm.audit.causality import CHECKS, cached, context, finite, gradients, modes, pairs, past, prefix, rows
from stacklm.audit.certificate import Fault
from stacklm.audit.probe import Probe
from stacklm.model.build import build

both_kinds = pytest.mark.parametrize("kind", ARCHITECTURES)


def probe(kind, plant=lambda model: None):
    return Probe(made(kind, plant), VOCAB, CONTEXT)


@both_kinds
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_shipped_architectures_pass(kind, check):
    assert check(probe(kind))
    assert check.claim


@both_kinds
def test_findings_are_measurements(kind):
    found = probe(kind)
    assert pairs(found) == "45 pairs of 10 positions, in both modes"
    assert past(found) == "45 of 45 pairs of a position and one before it, token by token"
    assert gradients(found) == "45 of 45 earlier inputs reached, no later one"
    assert context(found) == "9 cuts of 10 tokens, in both modes"
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
    with pytest.raises(Fault, match=r"^depends on the length: in a window cut to 1 tokens"):
        prefix(found)


@both_kinds
def test_a_normalisation_over_time_is_named(kind):
    found = probe(kind, MODEL_FAULTS["normalisation over time"])
    place = r"in both modes; the first module to let them in is `embedding_norm.1` \(NormOverTime\)"
    with pytest.raises(Fault, match=rf"^no mask, or a normalisation over time: every position sees all later tokens; {place}"):
        pairs(found)


def test_a_leak_in_the_model_itself_is_put_down_to_it():
    class Rolled(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = made("dense")
            self.embedding, self.head = self.model.embedding, self.model.head

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
    with pytest.raises(Fault, match=r"^batch rows mix: in training mode row 0 of 8 changes with the other rows"):
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
    assert context(Probe(model, VOCAB, 64)) == "16 cuts of 64 tokens, in both modes"
    norm = model.embedding_norm
    model.embedding_norm = nn.Sequential(norm, LateLeak())
    assert pairs(Probe(model, VOCAB, 64))
    with pytest.raises(Fault, match=r"^a leak in a window of 64: in training mode features before position 42 change with later"):
        context(Probe(model, VOCAB, 64))
    norm.register_forward_hook(lambda module, inputs, outputs: LateGradient.apply(outputs))
    model.embedding_norm = norm
    with pytest.raises(Fault, match=r"^a leak in a window of 64: gradients of features before position \d+ reach later tokens"):
        context(Probe(model, VOCAB, 64))


@both_kinds
def test_logits_that_depend_on_the_length_are_named(kind):
    def plant(model):
        model.norm = nn.Sequential(model.norm, Counted())

    found = probe(kind, plant)
    assert pairs(found)
    with pytest.raises(Fault, match=r"^depends on the length: in a window cut to 1 tokens, logits are off by .e-01"):
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
