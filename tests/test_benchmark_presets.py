"""The benchmark of the published models, at a size that takes no time."""

import runpy

import pytest
import torch
from conftest import ROOT

from stacklm.config.model import Stack, Stacked
from stacklm.model.build import ModelConfig


def test_a_model_is_built_and_trained_for_one_step():
    measure = runpy.run_path(str(ROOT / "benchmarks/presets.py"))["measure"]
    found = measure(ModelConfig(Stacked(16, 2, (Stack(4, 4, 16), Stack(4, 8, 32))), 1000, 8), torch.device("cpu"))
    assert found["parameters"] == found["counted"]
    assert found["loss"] == pytest.approx(found["uniform"], rel=0.05)
    assert found["step_seconds"] > 0 and found["grad_norm"] > 0 and found["peak"] > 0
