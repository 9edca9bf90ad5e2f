"""The programs in examples/ run and print the expected output."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from support import ROOT
from support.checkout import Checkout, run_main

EXAMPLES = {path.stem: path for path in (ROOT / "examples").glob("*.py")}


def run(name: str, *arguments: str) -> str:
    return run_main(lambda: runpy.run_path(str(EXAMPLES[name]), run_name="__main__"), *arguments)


def test_every_example_is_short_and_tested():
    tested = re.findall(r'run\("(\w+)"', Path(__file__).read_text())
    assert sorted(tested) == sorted(EXAMPLES)
    assert all(len(path.read_text().splitlines()) <= 60 for path in EXAMPLES.values())


def test_a_model_of_ones_own_is_counted_and_audited():
    printed = run("my_model")
    assert "4,096 parameters in head" in printed
    assert "MyModel: all 17 checks passed" in printed


def test_a_model_learns_a_string():
    printed = run("train_on_a_string")
    losses = [float(loss) for loss in re.findall(r"([\d.]+) nats per byte", printed)]
    assert losses[-1] < 0.3 < losses[0]
    assert "In a stack, many layers read the same input" in printed


def test_a_model_is_counted():
    printed = run("count_model")
    parts = [int(number.replace(",", "")) for number in re.findall(r"([\d,]+) parameters", printed)]
    assert sum(parts[:-1]) == parts[-1] > 0
    assert re.search(r"memory +[\d.]+ [MG]B \(", printed)


def test_a_fault_is_found_and_a_sound_model_passes():
    printed = run("audit_your_model")
    assert "sound: passed" in printed
    assert "faulty: FAILED" in printed
    assert "off by 1: positions see 1 tokens ahead" in printed


@pytest.mark.parametrize("name", ["stacked-1", "dense-1"])
def test_a_trained_model_writes(name, finished: Checkout, monkeypatch):
    monkeypatch.chdir(finished.root)
    assert len(run("generate_text", "def ", name)) > len("def \n")
