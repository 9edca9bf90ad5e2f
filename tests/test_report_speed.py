import dataclasses

import pytest
from report_files import Folders

from stacklm.report.speed import speed


def test_speed_is_taken_over_the_whole_run(tmp_path):
    run = Folders(tmp_path, {"stacked": 3.3, "dense": 3.2}).runs()[0]
    measured = speed(run)
    assert measured.seconds == pytest.approx(92.4)
    assert measured.tokens_per_second == pytest.approx(300 * 2048 / 92.4)
    assert measured.peak_memory == 1_000_000_000
    assert measured.gpu_memory is None

    on_gpu = [{**row, "gpu_memory_bytes": 5 * row["step"]} for row in run.timing]
    assert speed(dataclasses.replace(run, timing=on_gpu)).gpu_memory == 1500


def test_no_timing_is_no_speed(tmp_path):
    run = Folders(tmp_path, {"stacked": 3.3, "dense": 3.2}).runs()[0]
    assert speed(dataclasses.replace(run, timing=[])) is None
