"""The benchmark of the audit runs on the models of a params file."""

import subprocess
import sys

from support import ROOT
from support.checkout import TINY_PARAMS


def test_every_model_is_measured_against_a_step_of_its_training(tmp_path):
    (tmp_path / "params.yaml").write_text(TINY_PARAMS)
    command = [sys.executable, "benchmarks/audit.py", "--params", str(tmp_path / "params.yaml"), "--rounds", "1"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    rows = {line.split()[0]: line.split() for line in printed[2:]}
    assert rows and all(float(row[1]) > 0 and float(row[-1]) > 1 for row in rows.values())
    assert all(f"  {name}:" in TINY_PARAMS for name in rows)
