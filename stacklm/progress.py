"""Progress bars: updated in place on a terminal, occasional lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from typing import Any, TextIO

from tqdm import tqdm

SECONDS_PER_LINE = 10.0


def progress(iterable: Iterable | None = None, **options: Any) -> tqdm:
    """A progress bar on standard error, with the options of `tqdm`.

    If standard error is not a terminal, the latest state is printed as a line at most every 10 seconds, and once at the end
    unless `leave` is false.
    """
    if sys.stderr.isatty():
        return tqdm(iterable, mininterval=0.5, **options)
    return tqdm(iterable, mininterval=SECONDS_PER_LINE / 10, file=_Lines(sys.stderr), **options)


class _Lines:
    """Output file of a bar that is not on a terminal: turns updates with carriage returns into whole lines."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._state = ""
        self._due = time.monotonic() + SECONDS_PER_LINE

    def write(self, text: str) -> None:
        self._state = text.strip() or self._state
        if text == "\n" or time.monotonic() >= self._due:  # a lone newline closes the bar
            self._print()

    def flush(self) -> None:
        self._file.flush()

    def _print(self) -> None:
        if self._state:
            self._file.write(self._state + "\n")
        self._state = ""
        self._due = time.monotonic() + SECONDS_PER_LINE
