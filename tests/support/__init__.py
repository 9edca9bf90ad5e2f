"""Helpers shared by several test files."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
"""The repository's root."""


def wait_for(condition: Callable[[], Any], seconds: float = 120, interval: float = 0.05) -> None:
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "waited in vain"
        time.sleep(interval)


def edit(path: Path, old: str, new: str) -> None:
    """Replace the first occurrence of a text in a file, which must contain it."""
    text = path.read_text()
    assert old in text, f"{path}: no {old!r}"
    path.write_text(text.replace(old, new, 1))
