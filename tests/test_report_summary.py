from pathlib import Path

from report_files import MANIFEST, TRAIN, Folders

from stacklm.report.comparison import build_comparison
from stacklm.report.summary import summary


def test_the_summary_is_an_aligned_table_the_finding_and_where_to_look(tmp_path):
    runs = Folders(tmp_path, {"stacked": 3.31, "dense": 3.22}).runs()
    comparison = build_comparison(runs, TRAIN, MANIFEST, data_sha256="ab" * 32)
    lines = summary(comparison, Path("out/report")).splitlines()
    header, rule, *rows = lines[:4]
    assert {len(line) for line in (rule, *rows)} == {len(header)}
    assert [row.split()[0] for row in rows] == ["stacked", "dense"]
    assert all(row.endswith(f"{comparison['models'][row.split()[0]]['test']['bits_per_byte']:.4f}") for row in rows)
    assert comparison["finding"] in lines
    assert str(Path("out/report/index.html")) in lines[-2]
    assert "stacklm ui" in lines[-1]


def test_the_summary_needs_no_torch():
    import subprocess
    import sys

    code = "import sys, stacklm.report.summary; sys.exit('torch' in sys.modules or 'matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
