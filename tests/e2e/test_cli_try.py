"""A gate with real trainings, as a script runs it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from support.checkout import Checkout


@pytest.mark.slow
def test_a_script_gets_one_object_and_an_exit_code_and_the_same_answer_again(finished, tmp_path):
    project = Checkout(finished.copy(tmp_path / "project").root)
    options = ["--rates", "3", "--looks", "3,4", "--steps", "8", "--yes", "--json"]
    command = [sys.executable, "-m", "stacklm", "try", "stacked", *options]
    answers = []
    for _ in range(2):
        done = subprocess.run(command, cwd=project.root, env=project.environment, capture_output=True, text=True)
        answers.append(json.loads(done.stdout))
        assert done.returncode == answers[-1]["exit_code"] in (0, 3, 4, 5), done.stderr
        assert "audit: baseline passed all" in done.stderr and answers[-1]["sentence"] in done.stderr
    assert {k for k in answers[0] if answers[0][k] != answers[1][k]} <= {"sentence", "more_seconds"}  # these say how long
    records = project.root / "experiments" / "try-stacked" / "records"
    assert len([*records.iterdir()]) >= 2 * (3 + answers[0]["seeds"])
    trial = next(records.iterdir()).stem
    assert "the record is reproduced" in project.cli("verify", "try-stacked", trial)
