"""`stacklm lr-find` as a user runs it."""

from __future__ import annotations

from pathlib import Path

from stacklm.config.params import load
from stacklm.files import read_json
from support.checkout import Checkout


def test_without_tokens_the_user_is_told_how_to_make_them(fresh: Checkout) -> None:
    assert "`dvc repro shards`" in fresh.cli("lr-find", code=2)
    assert "no model 'dens'" in fresh.cli("lr-find", "--model", "dens", code=2)


def test_a_rate_is_suggested_and_written_and_nothing_else_changes(finished: Checkout, tmp_path: Path) -> None:
    checkout = finished.copy(tmp_path / "project")
    text = checkout.cli("lr-find", "--model", "dense", "--steps", "40", "--write")
    found = read_json(checkout.root / ".stacklm/lr-find/dense.json")
    assert (checkout.root / ".stacklm/lr-find/dense.svg").is_file()
    assert f"params.yaml: set models.dense.optimizer.peak_lr={found['suggestion']}" in text
    params = load(checkout.root / "params.yaml")
    assert params.models["dense"].optimizer.peak_lr == found["suggestion"]
    assert params.models["stacked"] == load(finished.root / "params.yaml").models["stacked"]
    assert checkout.run("git", "status", "--short").split() == ["M", "params.yaml"]
