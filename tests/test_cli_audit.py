"""`stacklm audit` as a user runs it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from conftest import Checkout

from stacklm.files import read_json
from stacklm.model.store import load_model, save_model


def audit(checkout: Checkout, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "stacklm", "audit", *arguments]
    return subprocess.run(command, cwd=checkout.root, env=checkout.environment, capture_output=True, text=True)


def test_the_models_of_a_project_are_audited_with_the_weights_they_have(finished: Checkout, tmp_path: Path) -> None:
    done = audit(finished, "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    for name in ("stacked", "dense"):
        assert f"audit {name}: all 22 checks passed" in done.stdout
        certificate = read_json(tmp_path / f"{name}.json")
        assert certificate["passed"]
        assert {check["of"] for check in certificate["checks"]} == {
            "fresh weights",
            "trained weights",
            "batches and loss",
            "learning",
        }
        assert certificate["subject"] == read_json(finished.root / "out/audits" / f"{name}.json")["subject"]


def test_one_model_without_weights(fresh: Checkout) -> None:
    done = audit(fresh, "--model", "dense")
    assert done.returncode == 0, done.stderr
    certificate = read_json(fresh.root / ".stacklm/audits/dense.json")
    assert certificate["checks"][9]["of"] == "briefly trained weights"


def test_a_folder_with_a_fault_is_told_by_the_exit_code(finished: Checkout, tmp_path: Path) -> None:
    model, config = load_model(finished.root / "out/models/dense")
    model.norm.weight.data[0] = torch.nan
    save_model(tmp_path / "broken", model, config.architecture, config.vocab_size, config.context)
    done = audit(finished, str(tmp_path / "broken"), "--out", str(tmp_path))
    assert done.returncode == 1
    assert "FAULT  finite     not finite: in training mode logits at positions 0, 1" in done.stdout
    assert read_json(tmp_path / "broken.json")["passed"] is False


def test_a_folder_without_a_model_is_an_error(finished: Checkout, tmp_path: Path) -> None:
    done = audit(finished, str(tmp_path))
    assert done.returncode == 2
    assert "a model is a folder with config.json and model.safetensors" in done.stderr
