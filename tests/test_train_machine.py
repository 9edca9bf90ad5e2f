from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from stacklm.config.schema import ParamsError
from stacklm.train.machine import prepare


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """What `prepare` sets holds for the whole process: put it back."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)


def test_threads_and_determinism_are_set() -> None:
    torch.use_deterministic_algorithms(False)
    for threads in (1, 2):
        assert prepare("cpu", threads) == torch.device("cpu")
        assert torch.get_num_threads() == threads
    assert torch.are_deterministic_algorithms_enabled()


def test_auto_takes_the_accelerator_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = []
    for cuda, mps in [(True, False), (False, True), (False, False)]:
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=cuda: there)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda there=mps: there)
        chosen.append(prepare("auto", 1).type)
    assert chosen == ["cuda", "mps", "cpu"]


def test_a_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ParamsError, match=r"cuda is not available here with torch .*; choose auto or .*cpu"):
        prepare("cuda", 1)
