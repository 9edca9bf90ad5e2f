"""Ctrl-C in a flow, even if other code swallows the exception."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys

import pytest
from prefect.task_runners import ThreadPoolTaskRunner

from flows.watch import stoppable
from stacklm.pipeline.watchdog import REPRO


def sleeper() -> subprocess.Popen:
    """A child that looks like the `dvc repro` of a task and does not end by itself."""
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)", REPRO])


def test_a_swallowed_interrupt_still_ends_the_children_and_is_raised_again():
    child, before = sleeper(), signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), stoppable(ThreadPoolTaskRunner(max_workers=1), grace=0):
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        child.wait(timeout=60)
        later = sleeper()
        later.wait(timeout=60)
    assert child.returncode and later.returncode
    assert signal.getsignal(signal.SIGINT) is before


def test_an_error_in_the_body_ends_the_children():
    child = sleeper()
    runner = ThreadPoolTaskRunner(max_workers=1)
    with pytest.raises(ValueError, match="of the body"), stoppable(runner, grace=0):
        runner._executor.submit(child.wait)  # as a task waits for its child: the runner's exit waits for that thread
        raise ValueError("of the body")
    assert child.returncode


def test_a_body_that_ends_well_leaves_the_children_alone():
    child = sleeper()
    with stoppable(ThreadPoolTaskRunner(max_workers=1), grace=0):
        pass
    assert child.poll() is None
    child.kill()
    child.wait()
