"""The benchmark of decoding runs, and its figures are those of the caches."""

import subprocess
import sys

from stacklm.files import read_json
from support import ROOT


def test_each_way_that_is_exact_is_measured(tmp_path):
    command = [sys.executable, "benchmarks/decode.py", "--contexts", "8", "--repeats", "1", "--threads", "1", "--device", "cpu"]
    done = subprocess.run([*command, "--json", str(tmp_path / "rows.json")], cwd=ROOT, capture_output=True, text=True, check=True)
    rows = read_json(tmp_path / "rows.json")
    found = {(row["model"].split()[0], row["way"]): row["bytes_per_token"] for row in rows}
    keys, values = 2 * 16 * 128, 16 * 4 * (8 + 16)
    assert found == {
        ("stacked", "keys and values"): 4 * (keys + values),
        ("stacked", "stack inputs"): 4 * 2 * 128,
        ("stacked", "recompute"): 0,
        ("dense", "keys and values"): 4 * 10 * 2 * 160,
        ("dense", "recompute"): 0,
    }
    assert all(row["milliseconds"] > 0 for row in rows)
    assert len(done.stdout.splitlines()) == 2 + len(rows)
