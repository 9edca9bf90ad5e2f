"""A run that finds no memory says which settings would have fitted."""

from __future__ import annotations

import sys

import pytest
import torch

from stacklm.plan.text import is_out_of_memory


def test_what_torch_says_when_memory_is_out_is_understood() -> None:
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60)
    assert is_out_of_memory(error.value)
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shapes cannot be multiplied"))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="memory is limited by the shell's ulimit")
def test_training_beyond_the_memory_ends_with_settings_that_fit(checkout) -> None:
    checkout.set("train.global_batch_size=2048", "train.micro_batch_size=2048", "models.dense.architecture.d_ff=20000")
    stage = f'"{sys.executable}" -m stacklm stage'
    said = checkout.run("sh", "-c", f"ulimit -v 5000000; {stage} audit dense && {stage} pretrain dense 1", code=None)
    assert "pretrain@dense-1 ran out of memory; its checkpoints are whole. It does not fit 5.12 GB" in said
    assert "train.micro_batch_size=" in said
    assert "Traceback" not in said
