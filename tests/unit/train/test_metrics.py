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
from stacklm.train import CheckpointError
from stacklm.train.metrics import JsonlWriter, Meter, peak_memory, read_rows


def test_rows_are_on_the_disk_at_once(tmp_path: Path) -> None:
    with JsonlWriter(tmp_path / "log.jsonl") as log:
        log.append({"step": 0, "loss": 0.1})
        assert (tmp_path / "log.jsonl").read_bytes() == b'{"step": 0, "loss": 0.1}\n'


def test_opening_drops_what_comes_after_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    rows = [{"step": step, "loss": 1 / (step + 1)} for step in range(6)]
    with JsonlWriter(path) as log:
        for row in rows:
            log.append(row)
    whole = path.read_bytes()
    with path.open("a") as file:
        file.write('{"step": 6, "lo')  # cut short by a kill
    with JsonlWriter(path, read_rows(path, last=3, every=1)) as log:
        assert read_jsonl(path) == rows[:4]
        for row in rows[4:]:
            log.append(row)
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, r"no row of step 0, 1, 2 and 1 more, but there is a checkpoint of step 3"),
        ("", r"no row of step 0, 1, 2 and 1 more"),
        ('{"step": 0}\n{"step": 1}\n{"step": 3}\n', r"no row of step 2, but there is a checkpoint of step 3; restore the file"),
        ('{"step": 0}\n{"step": 1}\n{"step": 2}\n{"step": 3, "lo', r"no row of step 3,"),
        ('{"step": 0}\n{"step": 1, "lo\n{"step": 2}\n{"step": 3}\n', r"line 2 is not a JSON object with a step"),
        ('{"step": 0}\n{"step": 1}\n{"step": 1}\n{"step": 2}\n{"step": 3}\n', r"line 3 has step 1 after step 1"),
        ('{"step": 0}\n\n{"step": 1}\n', r"line 2 is not a JSON object"),
        ('{"step": 0}\n[1]\n', r"line 2 is not a JSON object"),
        ('{"step": 0}\n{"step": 1, "loss": NaN}\n', r"line 2 is not a JSON object"),
        ('{"step": "0"}\n', r"line 1 has step '0'"),
    ],
)
def test_a_log_that_is_not_what_was_written_is_refused_with_the_line(tmp_path: Path, content: str | None, why: str) -> None:
    path = tmp_path / "log.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(CheckpointError, match=rf"log\.jsonl: {why}"):
        read_rows(path, last=3, every=1)


def test_rows_may_be_further_apart_than_steps(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in (0, 2, 3, 4, 6)))
    assert [row["step"] for row in read_rows(tmp_path / "log.jsonl", last=5, every=2)] == [0, 2, 3, 4]


def test_a_number_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    with JsonlWriter(tmp_path / "log.jsonl") as log, pytest.raises(ValueError):
        log.append({"step": 0, "loss": float("nan")})
    assert read_jsonl(tmp_path / "log.jsonl") == []


def test_the_meter_adds_training_time_to_that_of_earlier_runs() -> None:
    meter = Meter(seconds=100.0, device=torch.device("cpu"))
    assert meter.read()["tokens_per_second"] == 0.0
    longest = 0.0
    for tokens in (5, 7):
        started = time.perf_counter()
        with meter.training(tokens):
            time.sleep(0.02)
        longest += time.perf_counter() - started
        time.sleep(0.02)  # not training
    figures = meter.read()
    spent = figures["seconds"] - 100.0
    assert 0.04 <= spent <= longest
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
