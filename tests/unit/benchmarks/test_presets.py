"""The benchmark of the published models, at a size that takes no time."""

import runpy

import pytest
import torch

from stacklm.config.model import Model, Stack, Stacked
from stacklm.config.optimizer import Adafactor
from stacklm.config.train import Train
from stacklm.model.build import PRESETS, ModelConfig
from support import ROOT

FOUND = runpy.run_path(str(ROOT / "benchmarks/presets.py"))
SHIPPED = {path.stem.removesuffix("-8GB"): path for path in (ROOT / "docs" / "params").glob("*.yaml")}


def test_a_model_is_built_and_trained():
    config = Train(max_steps=100, context_length=8, global_batch_size=2, micro_batch_size=1)
    model = Model(Stacked(16, 2, (Stack(4, 4, 16), Stack(4, 8, 32))), Adafactor())
    found = FOUND["measure"](config, model, 1000, torch.device("cpu"), steps=2)
    assert found["parameters"] == found["counted"]
    assert found["loss"] == pytest.approx(found["uniform"], rel=0.05)
    assert found["step_seconds"] > 0 and found["grad_norm"] > 0 and found["peak"] > 0


def test_shipped_params_are_the_presets_made_lean():
    assert set(SHIPPED) == set(PRESETS)
    for name, path in SHIPPED.items():
        train, model, vocab_size = FOUND["settings"](str(path), 1)
        assert ModelConfig(model.architecture, vocab_size, train.context_length) == PRESETS[name]
        assert train.tokens_per_step == 4096
        assert isinstance(model.optimizer, Adafactor)
