"""Nothing can be learnt from random tokens, except by looking."""

import math

import pytest
import torch
from audit_faults import ARCHITECTURES, MODEL_FAULTS, Copies, builder

from stacklm.audit.certificate import Fault
from stacklm.audit.data import Machinery, counting
from stacklm.audit.floor import BATCH, floor, train, train_briefly
from stacklm.model.build import build

both_kinds = pytest.mark.parametrize("kind", ARCHITECTURES)


def fresh(kind, build=build):
    def make(vocab_size, context):
        torch.manual_seed(0)
        return build(ARCHITECTURES[kind], vocab_size, context)

    return make


@both_kinds
def test_our_models_stay_at_ln_v(kind):
    found = floor(fresh(kind), Machinery())
    assert 0 < float(found.split()[0]) < 0.05
    assert found == floor(fresh(kind), Machinery())


@both_kinds
@pytest.mark.parametrize("fault", ["upper-triangular mask", "mask missing in training mode", "convolution padded off by one"])
def test_a_model_that_sees_the_answer_goes_below(kind, fault):
    with pytest.raises(
        Fault, match=r"^below the floor: a loss of [01]\.\d+ nats on random tokens, .* the model is told the answer"
    ):
        floor(fresh(kind, builder(MODEL_FAULTS[fault])), Machinery())


@both_kinds
def test_labels_that_are_the_inputs_go_below(kind):
    with pytest.raises(Fault, match=r"^below the floor"):
        floor(fresh(kind), Machinery(train_batches=Copies))


@both_kinds
def test_what_can_be_learnt_is_learnt(kind):
    model = fresh(kind)(16, 8)
    losses = train(model, counting(BATCH * 8, 16), 8, 60, Machinery())
    assert losses[0] == pytest.approx(math.log(16), abs=0.3)
    assert losses[-1] < 1


def test_brief_training_changes_every_weight():
    model = fresh("dense")(16, 8)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train_briefly(model, 16, 8, Machinery())
    assert not any(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
