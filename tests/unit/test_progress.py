"""Progress bars outside a terminal print a few whole lines."""

from __future__ import annotations

import ast
import io
import sys
import time

import pytest
from tqdm import tqdm

from stacklm import progress as module
from stacklm.progress import progress
from support import ROOT


@pytest.fixture(autouse=True)
def interval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SECONDS_PER_LINE", 0.2)


def test_a_line_at_most_every_so_many_seconds_and_one_at_the_end(capsys: pytest.CaptureFixture) -> None:
    start = time.monotonic()
    with progress(total=500, desc="work", unit="step") as bar:
        for i in range(500):
            time.sleep(0.002)
            bar.set_postfix_str(f"loss {i}")  # this prints at once on a terminal
            bar.update()
    seconds = time.monotonic() - start
    lines = capsys.readouterr().err.split("\n")
    assert lines.pop() == ""
    assert 3 <= len(lines) <= seconds / 0.2 + 1
    assert all(line.startswith("work: ") and "\r" not in line for line in lines)
    assert "500/500" in lines[-1] and "loss 499" in lines[-1]


def test_a_short_bar_is_one_line_and_one_that_leaves_nothing_is_none(capsys: pytest.CaptureFixture) -> None:
    assert list(progress(range(100), desc="quick")) == list(range(100))
    output = capsys.readouterr().err
    assert output.count("\n") == 1
    assert output.startswith("quick: 100%")
    list(progress(range(100), desc="gone", leave=False))
    list(progress(range(100), desc="late", delay=5))
    list(progress(range(100), desc="off", disable=True))
    assert capsys.readouterr().err == ""


def test_the_last_state_before_an_error_is_printed(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(ValueError), progress(total=10, desc="fails") as bar:
        bar.update(4)
        raise ValueError
    assert "4/10" in capsys.readouterr().err.split("\n")[-2]


def test_messages_stay_whole_beside_a_bar(capsys: pytest.CaptureFixture) -> None:
    with progress(total=10, desc="work"):
        tqdm.write("a message", file=sys.stderr)
    assert capsys.readouterr().err.split("\n")[0] == "a message"


def test_a_terminal_has_a_bar_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    list(progress(range(3), desc="bar"))
    assert terminal.getvalue().startswith("\rbar:   0%")
    assert terminal.getvalue().count("\n") == 1


def test_every_bar_of_the_package_is_made_here() -> None:
    files = [path for folder in ("stacklm", "flows") for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 50
    calls = {
        path.relative_to(ROOT).as_posix()
        for path in files
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("tqdm", "trange", "tqdm.tqdm", "tqdm.trange")
    }
    assert calls == {"stacklm/progress.py"}
