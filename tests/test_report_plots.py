import dataclasses

import numpy as np
import pytest
from report_files import Folders

from stacklm.report.plots import AXES, draw_curves, spread


@pytest.fixture
def runs(tmp_path):
    return Folders(tmp_path, {"stacked": 3.31, "dense": 3.22}).runs()


def test_every_axis_is_drawn_for_light_and_dark(runs, tmp_path):
    folder = tmp_path / "report"
    folder.mkdir()
    assert draw_curves(runs, folder) == ["tokens", "flops", "time"]
    pictures = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert sorted(pictures) == sorted(f"loss-{axis}-{theme}.png" for axis in AXES for theme in ("light", "dark"))
    assert all(data.startswith(b"\x89PNG") and b"Software" not in data for data in pictures.values())
    assert len(set(pictures.values())) == 6


def test_pictures_are_the_same_bytes_whatever_the_users_own_style(runs, tmp_path):
    import matplotlib

    folders = [tmp_path / "first", tmp_path / "second"]
    for folder, style in zip(folders, ({}, {"font.size": 20, "axes.grid": True}), strict=True):
        folder.mkdir()
        with matplotlib.rc_context(style):
            draw_curves(runs, folder)
    for picture in folders[0].iterdir():
        assert picture.read_bytes() == (folders[1] / picture.name).read_bytes()


def test_a_run_without_timing_is_left_out_of_the_plot_against_time(runs, tmp_path):
    untimed = [dataclasses.replace(run, timing=[]) for run in runs]
    assert draw_curves([runs[0], untimed[1]], tmp_path) == ["tokens", "flops", "time"]
    (tmp_path / "none").mkdir()
    assert draw_curves(untimed, tmp_path / "none") == ["tokens", "flops"]


def test_seconds_are_interpolated_between_the_steps_that_were_timed(runs):
    seconds = AXES["time"].values(runs[0])
    assert seconds == pytest.approx(np.arange(301) * 92.4 / 300)


def test_labels_are_moved_apart_only_where_they_collide():
    assert spread([1.0, 2.0, 3.0], gap=0.5) == [1.0, 2.0, 3.0]
    apart = spread([1.0, 1.1, 1.1], gap=0.5)
    assert np.diff(apart) == pytest.approx([0.5, 0.5])
    assert np.mean(apart) == pytest.approx(np.mean([1.0, 1.1, 1.1]))
