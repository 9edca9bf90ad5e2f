"""`stacklm audit` as a user runs it."""

from __future__ import annotations

from pathlib import Path

from stacklm.files import read_json
from stacklm.model.store import load_model, save_model
from support.checkout import Checkout


def test_the_models_of_a_project_are_audited_with_the_weights_they_have(finished: Checkout, tmp_path: Path) -> None:
    printed = finished.stacklm("audit", "--out", str(tmp_path))  # in a process of its own, as a user has it
    for name in ("stacked", "dense"):
        assert f"audit {name}: all 15 checks passed" in printed
        certificate = read_json(tmp_path / f"{name}.json")
        assert certificate["passed"]
        assert {check["of"] for check in certificate["checks"]} == {
            "trained weights",
            "batches and loss",
            "learning",
        }
        assert certificate["subject"] == read_json(finished.root / "out/audits" / f"{name}.json")["subject"]


def test_one_model_without_weights(fresh: Checkout) -> None:
    fresh.cli("audit", "--model", "dense")
    certificate = read_json(fresh.root / ".stacklm/audits/dense.json")
    assert certificate["checks"][9]["of"] == "briefly trained weights"


def test_a_folder_with_a_fault_is_told_by_the_exit_code(finished: Checkout, tmp_path: Path) -> None:
    model, config = load_model(finished.root / "out/models/dense-1")
    model.norm.weight.data.fill_(3e38)  # finite, but its logits are not
    save_model(tmp_path / "broken", model, config.architecture, config.vocab_size, config.context_length)
    printed = finished.cli("audit", str(tmp_path / "broken"), "--out", str(tmp_path), code=1)
    assert "FAULT  finite     not finite: in training mode logits at positions 0, 1" in printed
    assert read_json(tmp_path / "broken.json")["passed"] is False


def test_a_folder_without_a_model_is_an_error(finished: Checkout, tmp_path: Path) -> None:
    printed = finished.cli("audit", str(tmp_path), code=2)
    assert "a model is a folder with config.json and model.safetensors" in printed
