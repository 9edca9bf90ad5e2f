from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from stacklm.config.schema import ParamsError
from stacklm.train.device import EXACT, choose_matmul_kernels, matmul_error, setup_device


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """What `setup_device` sets holds for the whole process: put it back."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    products = torch.backends.mkldnn.matmul.fp32_precision
    yield
    torch.backends.mkldnn.matmul.fp32_precision = products
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)


def test_threads_and_determinism_are_set() -> None:
    torch.use_deterministic_algorithms(False)
    for threads in (1, 2):
        assert setup_device("cpu", threads) == torch.device("cpu")
        assert torch.get_num_threads() == threads
    assert torch.are_deterministic_algorithms_enabled()


def test_products_keep_full_precision() -> None:
    setup_device("cpu", 1)
    assert matmul_error() < EXACT


def test_products_that_round_are_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stacklm.train.device.matmul_error", lambda: 2e-3)  # as with bfloat16
    choose_matmul_kernels()
    assert torch.backends.mkldnn.matmul.fp32_precision == "none"


def test_auto_takes_the_accelerator_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = []
    for cuda, mps in [(True, False), (False, True), (False, False)]:
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=cuda: there)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda there=mps: there)
        chosen.append(setup_device("auto", 1).type)
    assert chosen == ["cuda", "mps", "cpu"]


def test_a_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ParamsError, match=r"cuda is not available here with torch .*; choose auto or .*cpu"):
        setup_device("cuda", 1)


@pytest.mark.skipif(sys.platform != "linux", reason="only GNU OpenMP has the setting")
def test_threads_do_not_spin_for_long() -> None:
    """Where something else uses the cores, threads that spin take them from those that have work."""
    own = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    command = [sys.executable, "-c", "import stacklm.train.device"]
    done = subprocess.run(command, env={**own, "OMP_DISPLAY_ENV": "verbose"}, capture_output=True, text=True, check=True)
    assert "GOMP_SPINCOUNT = '1000'" in done.stderr
