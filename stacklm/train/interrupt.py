"""A polite end: a signal is noted, and the loop stops where its state is whole."""

from __future__ import annotations

import signal
import threading
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(RuntimeError):
    """The run was asked to stop, and did, with a checkpoint."""


class StopRequest:
    """Inside the block SIGINT and SIGTERM set `signal` to their name; a second one ends the process as it always did.

    In a `patient` one it does not: a process of a team hears of one Ctrl-C twice, from the terminal and from who started
    it, and is ended by the latter where it does not stop in time. Only the main thread can receive signals: elsewhere the
    block changes nothing.
    """

    def __init__(self, patient: bool = False) -> None:
        self.patient = patient
        self.signal: str | None = None
        self._previous: dict = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        self._give_back()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number).name
        if not self.patient:
            self._give_back()

    def _give_back(self) -> None:
        while self._previous:
            number, handler = self._previous.popitem()
            signal.signal(number, handler)
