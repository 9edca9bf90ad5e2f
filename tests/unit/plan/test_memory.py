"""Memory is planned from tensors without data, which are allocated and freed like those with data."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stacklm.config.model import Dense, FactoredAttention, Model, Stack, Stacked
from stacklm.config.optimizer import Adafactor, AdamW, Muon
from stacklm.config.schema import ParamsError
from stacklm.config.train import Train
from stacklm.plan import memory
from stacklm.plan.memory import COMPONENTS, Memory, evaluation_memory, fresh_run, training_memory, without_garbage_collector
from stacklm.plan.text import milestones_of
from stacklm.train.loss import token_losses
from stacklm.train.trainer import is_milestone, train_step
from support import ROOT
from support.custom_models import MODELS as CUSTOM
from support.custom_models import needs_transformers, written

VOCAB, CONTEXT = 101, 32
SHARED = FactoredAttention(qk_head_dim=8, rope=True, qk_norm=True, kv_sharing="stack")
MODELS = {
    "stacked": Stacked(32, 4, (Stack(4, 8, 64), Stack(4, 8, 64)), dropout=0.1),
    "modern": Stacked(
        32, 4, (Stack(4, 8, 64),) * 2, attention=SHARED, residual=True, skip_connections="input", conv_size=4, tie_embeddings=True
    ),
    "dense": Dense(48, 4, 2, 128, ffn="swiglu"),
}
RUNS = {
    "adamw": (AdamW(), {}),
    "adafactor": (Adafactor(), {}),
    "muon": (Muon(), {"micro_batch_size": 8}),
    "in backward": (AdamW(optimizer_in_backward=True), {"max_grad_norm": None, "micro_batch_size": 8}),
    "checkpointed": (AdamW(), {"activation_checkpointing": "full"}),
}


class RealPeak(TorchDispatchMode):
    """The most bytes of tensors with data that were alive after an operation."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._alive = 0
        self._storages: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._note(leaf.untyped_storage())
        self.peak = max(self.peak, self._alive)
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()

        def ended(_: weakref.ref) -> None:
            del self._storages[key]
            self._alive -= size

        if key not in self._storages:
            self._storages[key] = weakref.ref(storage, ended)
            self._alive += size


def settings_of(name: str, run: str, **changes) -> tuple[Model, Train]:
    optimizer, settings = RUNS[run]
    settings = {"max_steps": 100, "global_batch_size": 8, "micro_batch_size": 4} | settings | changes
    return Model(MODELS[name], optimizer), Train(context_length=CONTEXT, device="cpu", threads=1, **settings)


def real_peak(model: Model, train: Train) -> int:
    with without_garbage_collector(), RealPeak() as real:
        run = fresh_run(model, VOCAB, train)
        for _ in range(2):
            train_step(run, step=1)
    return real.peak


def in_a_fresh_process(code: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests")}
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, env=environment, check=True)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("name", MODELS)
def test_a_training_step_is_planned_to_the_byte(name, run):
    """The canary of what the tracer uses of torch's own: `_make_wrapper_subclass`, `_disabled_torch_function_impl`,
    `_current_graph_task_id`, `_cdata` and `_schema`."""
    model, train = settings_of(name, run)
    assert training_memory(model, VOCAB, train).tensors == real_peak(model, train)


@pytest.mark.parametrize("name", MODELS)
def test_a_step_in_bfloat16_is_planned_but_for_the_statistics_of_layer_norms(name):
    """Which torch keeps in bfloat16 on a CPU and in float32 on the meta device: 2 numbers per vector of at least 8."""
    model, train = settings_of(name, "adamw", precision="bf16")
    assert training_memory(model, VOCAB, train).tensors == pytest.approx(real_peak(model, train), rel=0.01)


@pytest.mark.parametrize("name", MODELS)
def test_evaluation_is_planned_to_the_byte(name):
    model, _ = settings_of(name, "adamw")
    with RealPeak() as real, torch.no_grad():
        network = memory.build(model.architecture, VOCAB, CONTEXT).eval()
        read = [torch.empty_like(parameter) for parameter in network.parameters()]
        for parameter, weights in zip(network.parameters(), read, strict=True):
            parameter.data = weights
        del read, weights
        token_losses(network, *(torch.zeros(4, CONTEXT, dtype=torch.long) for _ in range(2)))
    assert evaluation_memory(model, VOCAB, CONTEXT, 4).tensors == real.peak


@pytest.mark.parametrize("name", ["gpt", "linear-attention", pytest.param("llama", marks=needs_transformers)])
def test_models_from_elsewhere_are_planned_too(name):
    """Llama's within 10%: without data it cannot tell that no mask is needed, and makes one."""
    model, train = settings_of("dense", "adamw")
    model = replace(model, architecture=CUSTOM[name])
    assert training_memory(model, VOCAB, train).tensors == pytest.approx(real_peak(model, train), rel=0.1 if name == "llama" else 0)


@needs_transformers
def test_a_model_of_transformers_is_planned_in_a_fresh_process():
    """Where its modules are not imported yet: those that are made inside of a trace would have constants without data."""
    code = f"""if True:
        from dataclasses import replace
        from test_memory import CUSTOM, real_peak, settings_of, training_memory
        model, train = settings_of("dense", "adamw")
        model = replace(model, architecture=CUSTOM["llama"])
        assert training_memory(model, {VOCAB}, train).tensors
        assert real_peak(model, train)"""
    in_a_fresh_process(code)


def test_a_model_that_asks_for_numbers_is_told_why_it_cannot_be_planned(tmp_path):
    asks = written(tmp_path, ("self.head =", "self.rates = torch.linspace(0, 1, 4).tolist()\n        self.head ="))
    model, train = replace(settings_of("dense", "adamw")[0], architecture=asks), settings_of("dense", "adamw")[1]
    with pytest.raises(ParamsError, match=r"cannot estimate .*, since that runs it on tensors without data: mine\.py, line 10"):
        training_memory(model, VOCAB, train)


def test_a_plan_needs_no_compiler_and_leaves_it_usable():
    """The canary of `_compiler_not_imported`: importing torch._dynamo takes as long as importing torch."""
    code = f"""if True:
        import sys
        from test_memory import settings_of
        from stacklm.plan.memory import training_memory
        model, train = settings_of("dense", "adamw")
        training_memory(model, {VOCAB}, train)
        assert "torch._dynamo" not in sys.modules
        import torch
        assert torch._dynamo.config.cache_size_limit and torch.compiler.disable(len)([1]) == 1"""
    in_a_fresh_process(code)


def test_the_interval_widens_with_the_tensors_and_not_with_the_process():
    parts = dict.fromkeys(COMPONENTS, 0) | {"process": 300_000_000}
    assert Memory(parts).interval == (300_000_000, 300_000_000)
    low, high = Memory(parts | {"weights": 100_000_000, "allocator": 10_000_000}).interval
    assert low == pytest.approx(300e6 + 110e6 * memory.LOW) and high == pytest.approx(300e6 + 110e6 * memory.HIGH)
    assert low < 410e6 < high


def test_milestones_are_counted_without_a_loop_over_the_steps():
    for schedule, every, hard_stop, steps in itertools.product(("cosine", "wsd"), (None, 1, 4, 7, 50), (None, 3, 36), (37, 40)):
        settings = {"max_steps": steps, "warmup_steps": 2, "lr_schedule": schedule, "keep_every": every, "hard_stop": hard_stop}
        train = settings_of("dense", "adamw", **settings)[1]
        assert milestones_of(train) == sum(is_milestone(step, train) for step in range(train.last_step + 1))
