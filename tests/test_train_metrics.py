from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from stacklm.files import read_jsonl
from stacklm.train.metrics import Log, Meter, peak_memory


def test_rows_are_on_the_disk_at_once(tmp_path: Path) -> None:
    with Log(tmp_path / "log.jsonl", last=-1) as log:
        log.append({"step": 0, "loss": 0.1})
        assert (tmp_path / "log.jsonl").read_bytes() == b'{"step": 0, "loss": 0.1}\n'


def test_opening_drops_what_comes_after_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    rows = [{"step": step, "loss": 1 / (step + 1)} for step in range(6)]
    with Log(path, last=-1) as log:
        for row in rows:
            log.append(row)
    whole = path.read_bytes()
    with path.open("a") as file:
        file.write('{"step": 6, "lo')  # cut short by a kill
    with Log(path, last=3) as log:
        assert read_jsonl(path) == rows[:4]
        for row in rows[4:]:
            log.append(row)
    assert path.read_bytes() == whole


def test_a_number_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    with Log(tmp_path / "log.jsonl", last=-1) as log, pytest.raises(ValueError):
        log.append({"step": 0, "loss": float("nan")})
    assert read_jsonl(tmp_path / "log.jsonl") == []


def test_the_meter_adds_training_time_to_that_of_earlier_runs() -> None:
    meter = Meter(seconds=100.0, device=torch.device("cpu"))
    assert meter.read()["tokens_per_second"] == 0.0
    with meter.training(tokens=5):
        time.sleep(0.02)
    with meter.training(tokens=7):
        time.sleep(0.02)
    time.sleep(0.05)  # not training
    figures = meter.read()
    spent = figures["seconds"] - 100.0
    assert 0.04 <= spent < 0.09
    assert figures["tokens_per_second"] == pytest.approx(12 / spent)
    assert meter.read()["tokens_per_second"] == 0.0
    assert 0 < figures["process_rss_bytes"] <= figures["peak_memory_bytes"] * 1.01
    assert figures["process_rss_bytes"] < figures["system_memory_bytes"] < psutil.virtual_memory().total
    assert "gpu_memory_bytes" not in figures


def test_peak_memory_remembers_what_was_given_back_and_is_this_process_own() -> None:
    code = "from stacklm.train.metrics import peak_memory as p; print(p()); x = b'1' * 100_000_000; del x; print(p())"
    ballast = b"1" * 500_000_000  # must not be inherited by the process that is started now
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    before, after = map(int, done.stdout.split())
    assert 80_000_000 < after - before < 120_000_000
    assert after < len(ballast) < peak_memory()
