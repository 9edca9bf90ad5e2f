"""Pages of measurements are written from the output of commands."""

from __future__ import annotations

import sys

import pytest

from benchmarks.publish import main


def publish(monkeypatch: pytest.MonkeyPatch, folder, *words: str) -> str:
    monkeypatch.setattr(sys, "argv", ["publish.py", "loss", *words])
    main(folder)
    return (folder / "loss.md").read_text()


def test_a_page_holds_the_command_and_its_output_and_keeps_heading_and_notes(monkeypatch, tmp_path):
    (tmp_path / "loss.md").write_text("# The loss\n\nold text\n\n## Notes\n\nMeasured on a busy machine.\n")
    text = publish(monkeypatch, tmp_path, "--", sys.executable, "-c", "print('    time\\na  1.5 s   ')")
    assert text.startswith("# The loss\n\nWritten by `")
    assert "```text\n    time\na  1.5 s\n```\n\n## Notes\n\nMeasured on a busy machine.\n" in text
    assert "old text" not in text


def test_several_commands_make_one_page(monkeypatch, tmp_path):
    text = publish(monkeypatch, tmp_path, "--", sys.executable, "-c", "print(1)", "--", sys.executable, "-c", "print(2)")
    assert text.count("Written by `") == 2 and text.index("```text\n1\n```") < text.index("```text\n2\n```")


def test_a_command_that_fails_leaves_the_page(monkeypatch, tmp_path):
    (tmp_path / "loss.md").write_text("# The loss\n")
    with pytest.raises(Exception, match="exit status 3"):
        publish(monkeypatch, tmp_path, "--", sys.executable, "-c", "raise SystemExit(3)")
    assert (tmp_path / "loss.md").read_text() == "# The loss\n"
    with pytest.raises(SystemExit):
        publish(monkeypatch, tmp_path)
