"""Whole certificates: of models as they are, and of every planted fault, by its name."""

import json
from dataclasses import replace

import pytest
import torch
from audit_faults import ARCHITECTURES, CONTEXT, DATA_FAULTS, MODEL_FAULTS, VOCAB, builder, config, made
from train_files import write_cycle

from stacklm.audit import audit as module
from stacklm.audit.audit import audit, audit_folder, certify
from stacklm.audit.certificate import AuditError, Certificate, Fault, claims, examine
from stacklm.config.schema import plain
from stacklm.files import read_json
from stacklm.model.build import ModelConfig
from stacklm.model.store import save_model

both_kinds = pytest.mark.parametrize("kind", ARCHITECTURES)
NAMES = {
    "upper-triangular mask": "pairs of fresh weights: upper-triangular mask: ",
    "mask missing in evaluation mode": "modes of fresh weights: training and evaluation mode differ",
    "mask missing in training mode": "pairs of fresh weights: no mask, or a normalisation over time: ",
    "convolution padded off by one": "pairs of fresh weights: off by 1: ",
    "normalisation over time": "pairs of fresh weights: no mask, or a normalisation over time: ",
    "shifted labels": "labels of batches and loss: shifted labels: ",
    "windows overlap": "windows of batches and loss: windows overlap: ",
    "padding inside the loss": "padding of batches and loss: padding inside the loss: ",
}


@both_kinds
def test_our_models_are_certified_and_equally_so_each_time(kind):
    found = certify(config(kind))
    assert found.passed and not found.faults
    assert len(found.checks) == 22
    assert {check.of for check in found.checks} == {"fresh weights", "briefly trained weights", "batches and loss", "learning"}
    assert found == certify(config(kind))


@both_kinds
@pytest.mark.parametrize("fault", MODEL_FAULTS)
def test_a_fault_in_the_model_is_named_fresh_and_trained(kind, fault):
    faults = certify(config(kind), build=builder(MODEL_FAULTS[fault])).faults
    assert any(found.startswith(NAMES[fault]) for found in faults)
    assert any(found.startswith(NAMES[fault].replace("fresh", "briefly trained")) for found in faults)
    assert not any("batches and loss" in found for found in faults)


@pytest.mark.parametrize("fault", DATA_FAULTS)
def test_a_fault_in_data_or_loss_is_named(fault):
    faults = certify(config("dense"), machinery=DATA_FAULTS[fault]).faults
    assert faults[0].startswith(NAMES[fault])
    assert {found.partition(":")[0] for found in faults[1:]} <= {"floor of learning"}


def test_a_fault_that_only_trained_weights_have_is_found(tmp_path):
    model = made("dense")
    model.norm.weight.data[3] = torch.inf
    save_model(tmp_path, model, ARCHITECTURES["dense"], VOCAB, CONTEXT)
    faults = audit_folder(tmp_path).faults
    assert faults[0].startswith("finite of trained weights: not finite: in training mode logits at positions ")
    assert not any("fresh weights" in found for found in faults)


@both_kinds
def test_a_folder_is_audited_with_the_weights_in_it(kind, tmp_path):
    save_model(tmp_path, made(kind), ARCHITECTURES[kind], VOCAB, CONTEXT)
    found = audit_folder(tmp_path)
    assert found.passed
    assert found.checks[9].of == "trained weights"
    assert found.subject == plain(config(kind))


@both_kinds
def test_the_stage_writes_the_certificate_of_the_model_it_was_given(kind, tmp_path, capsys):
    shards = write_cycle(tmp_path / "shards", tokens=100)
    for name in ("one.json", "two.json"):
        audit(ARCHITECTURES[kind], CONTEXT, shards, tmp_path / name)
    record = read_json(tmp_path / "one.json")
    assert record["passed"] is True
    assert record["subject"] == plain(ModelConfig(ARCHITECTURES[kind], 16, CONTEXT))
    assert [check["name"] for check in record["checks"][:3]] == ["finite", "pairs", "past"]
    assert record["checks"][1]["claim"] == "no logit changes, to the last bit, with any token after its position"
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()
    assert f"audit {kind}: all 22 checks passed" in capsys.readouterr().out


def test_the_stage_fails_with_the_fault_and_writes_nothing(tmp_path, monkeypatch, capsys):
    planted = builder(MODEL_FAULTS["upper-triangular mask"])
    monkeypatch.setattr(module, "certify", lambda settings: certify(settings, build=planted))
    with pytest.raises(AuditError, match=r"not trained; pairs of fresh weights: upper-triangular mask: "):
        audit(ARCHITECTURES["dense"], CONTEXT, write_cycle(tmp_path / "shards", tokens=100), tmp_path / "audit.json")
    assert not (tmp_path / "audit.json").exists()
    printed = capsys.readouterr().out
    assert "FAULT  pairs      upper-triangular mask" in printed
    assert "claimed: no logit changes, to the last bit, with any token after its position" in printed


@claims("it is right")
def right(what):
    return f"{what} is right"


@claims("it is not wrong")
def wrong(what):
    raise Fault(f"{what} is wrong")


def test_a_certificate_passes_where_all_its_checks_do():
    good, bad = examine(right, 1, of="one"), examine(wrong, 2, of="two")
    assert (good.name, good.of, good.claim, good.passed, good.finding) == ("right", "one", "it is right", True, "1 is right")
    assert (bad.name, bad.passed, bad.finding) == ("wrong", False, "2 is wrong")
    certificate = Certificate({"a": 1}, (good, good))
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
        examine(claims("it divides")(lambda: 1 / 0), of="numbers")
