"""Complete certificates: of sound models, and of every planted fault, which is named."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from stacklm.audit import AuditError, Fault
from stacklm.audit import audit as module
from stacklm.audit.audit import Certificate, audit, audit_folder, causal, certify, examine
from stacklm.audit.causality import on_threads
from stacklm.config.schema import plain
from stacklm.files import read_json
from stacklm.model.build import ModelConfig
from stacklm.model.store import save_model
from support.audit_faults import (
    ARCHITECTURES,
    CONTEXT,
    DATA_FAULTS,
    EMBEDDING,
    HIDDEN_FAULTS,
    LONG,
    MODEL_FAULTS,
    TRAIN,
    VOCAB,
    Ahead,
    Gated,
    behind,
    builder,
    config,
    made,
)
from support.train_files import write_text

both_kinds = pytest.mark.parametrize("kind", ARCHITECTURES)
NAMES = {
    "upper-triangular mask": "pairs of briefly trained weights: upper-triangular mask: ",
    "mask missing in evaluation mode": "modes of briefly trained weights: training and evaluation mode differ",
    "mask missing in training mode": "pairs of briefly trained weights: no mask, or a normalisation over time: ",
    "convolution padded off by one": "pairs of briefly trained weights: off by 1: ",
    "normalisation over time": "pairs of briefly trained weights: no mask, or a normalisation over time: ",
    "shifted labels": "labels of batches and loss: shifted labels: ",
    "sequences overlap": "sequences of batches and loss: sequences overlap: ",
    "padding inside the loss": "padding of batches and loss: padding inside the loss: ",
}


@both_kinds
def test_our_models_are_certified(kind):
    found = certify(config(kind), TRAIN)
    assert found.passed and not found.faults
    assert len(found.checks) == 15
    assert {check.of for check in found.checks} == {"briefly trained weights", "batches and loss", "learning"}


@pytest.mark.parametrize(("kind", "fault"), [*(("dense", fault) for fault in MODEL_FAULTS), ("stacked", "upper-triangular mask")])
def test_a_fault_in_the_model_is_named(kind, fault):
    faults = certify(config(kind), TRAIN, build=builder(MODEL_FAULTS[fault])).faults
    assert any(found.startswith(NAMES[fault]) for found in faults)
    assert not any("batches and loss" in found for found in faults)


@pytest.mark.parametrize("fault", DATA_FAULTS)
def test_a_fault_in_data_or_loss_is_named(fault):
    faults = certify(config("dense"), TRAIN, machinery=DATA_FAULTS[fault]).faults
    assert faults[0].startswith(NAMES[fault])
    assert {found.partition(":")[0] for found in faults[1:]} <= {"floor of learning", "uniform of batches and loss"}


def test_a_fault_that_only_trained_weights_have_is_found(tmp_path):
    model = made("dense")
    model.norm.weight.data[3] = 3e38  # a finite number, whose products are not
    save_model(tmp_path, model, ARCHITECTURES["dense"], VOCAB, CONTEXT)
    faults = audit_folder(tmp_path).faults
    assert faults[0].startswith("finite of trained weights: not finite: in training mode logits at positions ")


def test_a_folder_is_audited_with_the_weights_in_it(tmp_path):
    save_model(tmp_path, made("dense"), ARCHITECTURES["dense"], VOCAB, CONTEXT)
    found = audit_folder(tmp_path)
    assert found.passed
    assert found.checks[0].of == "trained weights"
    assert found.subject == plain(config("dense"))


def test_the_stage_writes_the_certificate_of_the_model_it_was_given(tmp_path, capsys):
    shards = write_text(tmp_path / "shards")
    for name in ("one.json", "two.json"):
        audit(ARCHITECTURES["dense"], TRAIN, shards, tmp_path / name)
    record = read_json(tmp_path / "one.json")
    assert record["passed"] is True
    assert record["subject"] == plain(ModelConfig(ARCHITECTURES["dense"], 16, CONTEXT))
    assert [check["name"] for check in record["checks"][:3]] == ["finite", "repeats", "pairs"]
    assert record["checks"][2]["claim"] == "no logit changes, to the last bit, with any token after its position"
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()
    assert "audit dense: all 17 checks passed" in capsys.readouterr().out


def test_the_stage_fails_with_the_fault_and_writes_nothing(tmp_path, monkeypatch, capsys):
    planted = builder(MODEL_FAULTS["upper-triangular mask"])
    monkeypatch.setattr(module, "certify", lambda *settings, **more: certify(*settings, **more, build=planted))
    with pytest.raises(AuditError, match=r"not trained; pairs of briefly trained weights: upper-triangular mask: "):
        audit(ARCHITECTURES["dense"], TRAIN, write_text(tmp_path / "shards"), tmp_path / "audit.json")
    assert not (tmp_path / "audit.json").exists()
    printed = capsys.readouterr().out
    assert "FAULT  pairs      upper-triangular mask" in printed
    assert "claimed: no logit changes, to the last bit, with any token after its position" in printed


def right(what):
    """it is
    right

    And more that is no claim.
    """
    return f"{what} is right"


def wrong(what):
    """it is not wrong"""
    raise Fault(f"{what} is wrong")


def test_a_certificate_passes_where_all_its_checks_do():
    good, bad = examine(right, 1, of="one"), examine(wrong, 2, of="two")
    assert (good.name, good.of, good.claim, good.passed, good.finding) == ("right", "one", "it is right", True, "1 is right")
    assert (bad.name, bad.passed, bad.finding) == ("wrong", False, "2 is wrong")
    certificate = Certificate({"a": 1}, {"b": 2}, "code", (good, good))
    assert certificate.passed
    certificate = replace(certificate, checks=(good, bad))
    assert not certificate.passed
    assert certificate.faults == ["wrong of two: 2 is wrong"]
    assert json.loads(json.dumps(certificate.plain()))["checks"][1]["finding"] == "2 is wrong"
    assert certificate.table("it").splitlines() == [
        "it: 1 of 2 checks FAILED",
        "  one",
        "    ok     right      1 is right",
        "  two",
        "    FAULT  wrong      2 is wrong",
        "                      claimed: it is not wrong",
    ]


def test_an_error_of_another_kind_is_no_finding():
    with pytest.raises(ZeroDivisionError):
        examine(lambda: 1 / 0, of="numbers")


@pytest.fixture
def traced_alone(monkeypatch):
    """What would be compiled is traced by torch.compile and then run as it is: no C++ compiler is needed, nor its time."""
    original = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda module, **settings: original(module, backend="eager", **settings))


def faults(kind, plant, settings):
    """What the audit finds in a model as it is first built, where it is asked of its weights alone."""
    subject, model = ModelConfig(ARCHITECTURES[kind], VOCAB, LONG), made(kind, plant, LONG)
    entries = causal(model, subject, replace(TRAIN, context_length=LONG, **settings), "weights", lambda: model)
    with on_threads(1):
        checks = [examine(check, *arguments, of=of) for check, arguments, of in entries]
    return [f"{check.name} of {check.of}: {check.finding}" for check in checks if not check.passed]


@pytest.mark.usefixtures("traced_alone")
@pytest.mark.parametrize("fault", HIDDEN_FAULTS)
def test_a_hidden_fault_is_named(fault):
    kind, plant, settings, name = HIDDEN_FAULTS[fault]
    found = faults(kind, plant, settings)
    assert any(finding.startswith(name) for finding in found), found


@pytest.mark.parametrize("settings", [{"precision": "bf16"}, {"activation_checkpointing": "full"}])
def test_there_are_none_without(settings):
    assert not faults("dense", lambda model: None, settings)


def test_a_gate_that_training_opens_is_found():
    assert not faults("dense", behind(EMBEDDING, Gated), {})
    found = certify(config("dense"), TRAIN, build=builder(behind(EMBEDDING, Gated))).faults
    assert found[0].startswith("pairs of briefly trained weights: off by 1: ")


@pytest.mark.parametrize("share", [1.0, 1e-2])
def test_a_leak_on_several_threads_only_is_found(share):
    plant = behind(EMBEDDING, lambda: Ahead(share, when=lambda module: torch.get_num_threads() > 1))
    assert faults("dense", plant, {"threads": 1}) == []
    (found,) = faults("dense", plant, {"threads": 2})
    assert found.startswith("threads of weights: depends on the threads: on 2 threads, features are off by ")
