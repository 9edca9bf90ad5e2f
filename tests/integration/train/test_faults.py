"""Many faults in one training run: it ends with the same bytes as an undisturbed run."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest

from stacklm.files import read_json, read_jsonl
from support.train_files import Lab

SETTINGS = {"warmup_steps": 20, "eval_every": 25, "checkpoint_every": 2, "keep_checkpoints": 3}


@pytest.mark.parametrize(("kills", "steps"), [(4, 150), pytest.param(25, 300, marks=pytest.mark.slow)])
def test_kills_at_random_moments_and_spoilt_files_change_nothing(tmp_path: Path, kills: int, steps: int) -> None:
    lab = Lab(tmp_path)
    settings = {**SETTINGS, "max_steps": steps}
    assert lab.run("whole", **settings) == 0
    moments = random.Random(kills)
    checkpoints = lab.work("hit") / "checkpoints"
    spoilt = {kills // 3: truncate, 2 * kills // 3: flip_a_bit}
    for kill in range(kills):
        process = lab.start("hit", **settings)
        before = newest(checkpoints)
        while newest(checkpoints) <= before:  # one checkpoint further than ever, a spoilt one among them: all kills find work to do
            assert process.is_alive(), lab.log("hit")[-2000:]
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.05))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, lab.log("hit")[-2000:]
        assert_at_most_the_work_since_the_last_checkpoint_is_lost(lab.work("hit"))
        if kill in spoilt:
            spoilt[kill](checkpoints / newest(checkpoints))
    assert lab.run("hit", **settings) == 0
    assert lab.result("hit") == lab.result("whole")
    assert lab.log("hit").count("is damaged or incomplete, going back to the one before") == len(spoilt)


def newest(checkpoints: Path) -> str:
    """The name of the last checkpoint, which sorts as its step does; empty before the first."""
    return max((folder.name for folder in checkpoints.glob("step-*")), default="")


def assert_at_most_the_work_since_the_last_checkpoint_is_lost(work: Path) -> None:
    checkpoints = work / "checkpoints"
    step = read_json(checkpoints / newest(checkpoints) / "state.json")["progress"]["step"]
    rows = [row["step"] for row in read_jsonl(work / "metrics.jsonl")]
    assert rows[: step + 1] == list(range(step + 1))
    assert rows[-1] <= step + SETTINGS["checkpoint_every"]


def truncate(checkpoint: Path) -> None:
    path = checkpoint / "tensors.safetensors"
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(checkpoint: Path) -> None:
    path = checkpoint / "tensors.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
