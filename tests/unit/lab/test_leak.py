"""The planted leaks are as described, the audit names them, and none of them deceives the honest evaluation."""

from __future__ import annotations

import math

import pytest
import torch

from stacklm.audit import Fault, causality, data
from stacklm.audit.probe import Probe
from stacklm.data.batches import evaluation_batches
from stacklm.lab import leak
from stacklm.lab.leak import CASES, CONTEXT, END, FLOOR, MODEL, SETTINGS, TEXT
from stacklm.model.layers import Head, LanguageModel
from stacklm.train.loss import token_losses
from support import ROOT

RIGHT, MASK, TRAINING, WINDOWS, PADDING = CASES


def made(case: leak.Case) -> LanguageModel:
    torch.manual_seed(0)
    model = case.build(MODEL, TEXT + 1, CONTEXT)
    for part in model.parameters():
        torch.nn.init.normal_(part, std=0.2)  # output projections begin at zero, and nothing would be seen through them
    return model


def fault(case: leak.Case) -> str:
    """What the check that is to name the fault says; nothing where it passes."""
    try:
        if case.check == "pairs":
            causality.pairs(Probe(made(case), TEXT + 1, CONTEXT))
        for check in data.CHECKS:
            if check.__name__ == case.check:
                check(case.machinery, SETTINGS)
    except Fault as found:
        return str(found)
    return ""


@pytest.mark.parametrize(
    ("case", "named"),
    [
        (RIGHT, ""),
        (MASK, "upper-triangular mask: positions see later tokens and none before them; in both modes"),
        (TRAINING, "upper-triangular mask: positions see later tokens and none before them; in training mode only"),
        (WINDOWS, f"sequences overlap: of {CONTEXT} tokens each, they begin as near as 1 apart"),
        (PADDING, "padding inside the loss"),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_the_audit_names_the_fault_of_every_case(case: leak.Case, named: str):
    assert fault(case).startswith(named) and bool(fault(case)) == bool(named)


def test_the_right_case_passes_all_checks_that_name_a_fault():
    causality.pairs(Probe(made(RIGHT), TEXT + 1, CONTEXT))
    for check in data.CHECKS:
        check(RIGHT.machinery, SETTINGS)


def test_the_honest_loss_of_a_causal_model_is_that_of_ordinary_evaluation():
    model, text = made(RIGHT).eval(), leak.random_text(8 * CONTEXT, key=3)
    (inputs_BT, targets_BT, _), *rest = evaluation_batches(text, CONTEXT, 8)
    assert rest == []
    with torch.no_grad():
        losses_BT = token_losses(model, inputs_BT, targets_BT)
    assert leak.honest_loss(model, text, CONTEXT, places=CONTEXT) == pytest.approx(losses_BT.mean().item(), rel=1e-5)


class Told(LanguageModel):
    """Certain of the next token wherever it is among the inputs, and of nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.head = Head(TEXT + 1, TEXT + 1)
        torch.nn.init.eye_(self.head.weight)

    def features(self, ids_BT: torch.Tensor) -> torch.Tensor:
        known_BTV = 30.0 * torch.nn.functional.one_hot(ids_BT[:, 1:], TEXT + 1)
        return torch.cat([known_BTV, torch.zeros(len(ids_BT), 1, TEXT + 1)], dim=1)


def test_the_honest_loss_gives_a_model_nothing_of_what_it_is_to_predict():
    text = leak.random_text(8 * CONTEXT, key=3)
    inputs_BT, targets_BT, _ = next(evaluation_batches(text, CONTEXT, 8))
    assert token_losses(Told(), inputs_BT, targets_BT)[:, :-1].max().item() < 1e-6
    assert leak.honest_loss(Told(), text, CONTEXT) == pytest.approx(math.log(TEXT + 1))


def test_windows_kept_for_validation_are_none_of_those_trained_on_but_overlap_them():
    tokens, batch = 40 * CONTEXT, 16
    text, held_out = data.counting(tokens, tokens), leak.random_text(4 * CONTEXT, key=2)
    batches = leak.Windows(text, CONTEXT, batch, 0)
    steps = range(batches.sequences // batch)
    trained = torch.cat([batches.batch(step)[1] for step in steps])
    kept = torch.cat([targets for _, targets, _ in leak.kept_windows(text, held_out, CONTEXT, batch)])
    assert not {*trained[:, 0].tolist()} & {*kept[:, 0].tolist()}
    assert trained[:, 0].unique().numel() == len(trained)
    assert {*kept.flatten().tolist()} - {*trained.flatten().tolist()} <= {1}  # with which the first window of all begins
    assert len(kept) == 4


def test_half_of_the_padded_targets_are_padding_and_the_text_before_it_is_as_it_was():
    text = leak.random_text(64 * CONTEXT, key=1)
    plain, padded = (kind(text, CONTEXT, 64, 0).batch(0) for kind in (leak.TrainBatches, leak.Padded))
    text_BT = padded[1] != END
    assert 0.4 < text_BT.float().mean() < 0.6 and text_BT[:, 0].all()
    assert torch.equal(padded[1][text_BT], plain[1][text_BT]) and torch.equal(padded[0][text_BT], plain[0][text_BT])


def test_a_case_is_trained_and_examined_and_its_loss_falls_below_the_floor():
    found = leak.run_case("padding in the loss", steps=leak.EVERY)
    assert [point.step for point in found.points] == [leak.EVERY]
    assert found.named == "padding inside the loss" and found.faults[0].name == "padding"
    assert found.reported < 0.7 * FLOOR < FLOOR < found.last.honest


def test_no_part_that_trains_can_reach_the_faults():
    users = [
        path.name
        for path in (ROOT / "stacklm").rglob("*.py")
        if "lab.leak" in path.read_text() or "lab import leak" in path.read_text()
    ]
    assert sorted(users) == ["cli_start.py", "leak.py"]
