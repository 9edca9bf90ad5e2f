"""The benchmark of a training step: every form runs, agrees with the others, and is measured once."""

import importlib
import subprocess
import sys

import numpy as np
import pytest
import torch

from stacklm.files import read_json
from support import ROOT


@pytest.fixture
def step(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("step")


def test_all_forms_take_turns_and_what_a_file_holds_is_not_measured_again(tmp_path, step, monkeypatch, capsys):
    arguments = [
        "benchmarks/step.py",
        "--sizes",
        "tiny",
        "--repeats",
        "1",
        "--threads",
        "1",
        "--json",
        str(tmp_path / "found.json"),
    ]
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    rows = {row["form"]: row for row in read_json(tmp_path / "found.json")["tiny"]["rows"]}
    assert list(rows) == ["published", "plain loop", "packed", "folded", "checkpointed"]
    assert all(row["wall"] > 0 and row["turns"] == 1 and row["peak"] > 0 for row in rows.values())
    assert rows["packed"]["operations"] == rows["plain loop"]["operations"]
    assert rows["folded"]["operations"] < rows["checkpointed"]["operations"]
    assert len(done.stdout.splitlines()) == 3 + len(rows) + 1
    monkeypatch.setattr(sys, "argv", arguments)
    step.main()
    assert capsys.readouterr().out == done.stdout


def test_a_form_that_computes_something_else_is_found(step):
    wanted = step.Step("plain loop", step.SIZES["tiny"], torch.device("cpu")).digest()
    step.check("the same", wanted, wanted)
    turned = step.Digest(wanted.logits, wanted.norms, -wanted.directions, 0)
    longer = step.Digest(wanted.logits, 1.5 * wanted.norms, wanted.directions, 0)
    other = step.Digest(np.zeros_like(wanted.logits), wanted.norms, wanted.directions, 0)
    for what, found in (("logits", other), ("lengths", longer), ("directions", turned)):
        with pytest.raises(AssertionError, match=f"differ by .* in .*{what}"):
            step.check("other", found, wanted)
