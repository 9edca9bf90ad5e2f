"""The checks of batches and losses pass ours, and name what is planted."""

import re

import pytest
from audit_faults import Copies, Overlapping, Repeating, ShiftedTwice, careless_score, shifted_evaluation, unmasked

from stacklm.audit.certificate import Fault
from stacklm.audit.data import CHECKS, Machinery, labels, padding, windows
from stacklm.data.batches import TrainBatches


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_ours_pass(check):
    assert check(Machinery())
    assert check.claim


class TwoAhead(TrainBatches):
    def batch(self, step):
        inputs_BT, targets_BT = super().batch(step)
        return inputs_BT, (targets_BT + 1) % 64  # in a stream that counts


class Mixed(TrainBatches):
    def batch(self, step):
        inputs_BT, targets_BT = super().batch(step)
        targets_BT[0, 0] = inputs_BT[0, 0]
        return inputs_BT, targets_BT


FAULTS = [
    (labels, Machinery(train_batches=Copies), "shifted labels: in training the loss asks for the token 0 places on"),
    (labels, Machinery(train_batches=TwoAhead), "shifted labels: in training the loss asks for the token 2 places on"),
    (labels, Machinery(train_batches=Mixed), "shifted labels: in training the loss asks for no one place"),
    (
        labels,
        Machinery(evaluation_batches=shifted_evaluation),
        "shifted labels: in evaluation the loss asks for the token 0 places",
    ),
    (labels, Machinery(objective=ShiftedTwice), "shifted labels: in training the loss asks for the token 2 places on"),
    (windows, Machinery(train_batches=Overlapping), "windows overlap: of 8 tokens each, they begin as near as 4 apart"),
    (windows, Machinery(train_batches=Repeating), "windows are not seen once an epoch: in 4 epochs of 96 tokens, 24 of them"),
    (padding, Machinery(evaluation_batches=unmasked), "padding inside the loss: 72 tokens were scored in a stream of 59"),
    (
        padding,
        Machinery(score=careless_score),
        "padding inside the loss: 59 tokens were scored in a stream of 59, with a mean loss of",
    ),
]


@pytest.mark.parametrize(("check", "machinery", "fault"), FAULTS, ids=[fault[:60] for _, _, fault in FAULTS])
def test_planted_faults_are_named(check, machinery, fault):
    with pytest.raises(Fault, match=re.escape(fault)):
        check(machinery)
