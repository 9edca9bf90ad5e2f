"""The benchmarks of training compare like with like."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from stacklm.config.model import Dense, Stack, Stacked
from stacklm.config.train import Train
from stacklm.data.batches import TrainBatches
from stacklm.model.count import count
from support import ROOT


def benchmark(name: str) -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", ROOT / "benchmarks" / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def throughput() -> ModuleType:
    return benchmark("throughput")


@pytest.mark.parametrize("name", ["small", "medium"])
def test_the_dense_model_costs_what_the_textbooks_does(throughput, name) -> None:
    size = throughput.SIZES[name]
    with torch.device("meta"):
        textbook = throughput.Textbook(size)
    counts = {kind: count(architecture, size.vocab_size, size.context) for kind, architecture in size.ours.items()}
    assert counts["dense"].training_flops_per_token == textbook.training_flops_per_token(size.context)
    assert counts["dense"].total == pytest.approx(throughput.parameters_of(textbook), rel=0.05)
    assert counts["stacked"].total == pytest.approx(counts["dense"].total, rel=0.01)


def test_all_learn_from_the_same_batches_and_are_timed_in_turns(throughput, tmp_path, capsys) -> None:
    ours = {"dense": Dense(16, 2, 1, 64), "stacked": Stacked(16, 2, (Stack(2, 8, 16),))}
    size = throughput.Size(layers=1, width=16, heads=2, context=8, batch=4, ours=ours, steps=3)
    config = Train(max_steps=100, context_length=8, global_batch_size=4, micro_batch_size=4, warmup_steps=1)
    batches = TrainBatches(throughput.library(tmp_path / "tokens.bin"), 8, 4, config.seed)
    device = torch.device("cpu")
    runners = [
        throughput.textbook(size, config, batches, device),
        *(throughput.ours(kind, size, config, batches, device) for kind in ours),
    ]
    rows = throughput.compare("tiny", size, runners, rounds=1, device=device)
    assert [row["model"] for row in rows] == ["textbook", "dense", "stacked"]
    assert rows[0]["ratio"] == rows[0]["cpu_ratio"] == rows[0]["equal_loss"] == 1
    assert all(row["tokens_per_second"] == 3 * 4 * 8 / row["wall"] and row["loss"] < 6 for row in rows)
    assert capsys.readouterr().out.startswith("tiny: 1 layers, 16 wide, context 8, batch 4; matrices ")
    assert throughput.loader(batches, count=3) > 0


def test_the_textbooks_model_does_not_look_ahead(throughput) -> None:
    size = throughput.Size(layers=2, width=16, heads=2, context=8, batch=1, ours={}, steps=1)
    model = throughput.Textbook(size)
    ids_BT = torch.randint(throughput.END, (2, 8))
    ids_BT[1, :5] = ids_BT[0, :5]
    first, second = model(ids_BT)
    torch.testing.assert_close(first[:5], second[:5])
    assert (first[5:] != second[5:]).any()


def test_all_forms_of_the_loss_agree() -> None:
    loss = benchmark("loss")
    torch.manual_seed(0)
    model, targets_BT = loss.Features(40, 8, 30), torch.randint(30, (1, 40))
    wanted = F.cross_entropy(model.head(model.x_RC), targets_BT[0]).item()
    for name, form in loss.FORMS.items():
        assert loss.step(model, targets_BT, form) == pytest.approx(wanted, rel=1e-5), name
        assert model.head.weight.grad.any() and model.x_RC.grad.any()


def test_characters_are_split_in_their_order() -> None:
    vocab_size, train, valid = benchmark("shakespeare").streams("to be or not to be, " * 10)
    assert vocab_size == 1 + len(set("to be or not to be, "))
    assert (len(train), len(valid)) == (180, 20)
    assert train[:20].tolist() == valid[:20].tolist() == train[160:180].tolist()
    assert min(train[:180]) == 1 and max(train[:180]) == vocab_size - 1
