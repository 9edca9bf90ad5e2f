from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from stacklm.model.kernels.attention import blocked_attention
from stacklm.model.kernels.threads import each
from support.rounding import assert_same

pytestmark = pytest.mark.numerical


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_every_piece_is_worked_on_once_by_a_thread_that_divides_nothing(threads: int) -> None:
    at_work = threading.Barrier(threads)
    seen = []

    def note(piece: int) -> None:
        at_work.wait(timeout=60)  # only passed when as many are at work
        seen.append((piece, torch.get_num_threads(), torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))

    with torch.autocast("cpu", torch.bfloat16):
        each(note, range(3 * threads))
    assert sorted(seen) == [(piece, 1, False, False) for piece in range(3 * threads)]
    assert torch.get_num_threads() == threads


def test_an_error_comes_out(threads: int) -> None:
    def fail(piece: int) -> None:
        raise ValueError(f"piece {piece}")

    with pytest.raises(ValueError, match="piece 0"):
        each(fail, range(5))


def test_threads_to_come_have_as_many_as_before(threads: int) -> None:
    each(lambda piece: None, range(5))
    found = []
    newcomer = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    newcomer.start()
    newcomer.join()
    assert found == [threads]


def test_attention_in_pieces_is_the_same_under_inference_mode(threads: int) -> None:
    parts = [torch.randn(2, 40, 6, dim) for dim in (8, 8, 3)]
    with torch.inference_mode():
        found = blocked_attention(*parts)
    torch.set_num_threads(1)
    assert_same(found, blocked_attention(*parts), 8 + 40)
