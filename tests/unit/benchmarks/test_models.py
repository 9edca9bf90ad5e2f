"""The benchmarks of models run at a tiny size, and their comparisons are fair."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from benchmarks import audit, decode, loss, presets, shakespeare, step, throughput
from stacklm.config.model import Dense, Model, Stack, Stacked
from stacklm.config.optimizer import Adafactor
from stacklm.config.train import Train
from stacklm.data.batches import TrainBatches
from stacklm.files import read_json
from stacklm.model.build import PRESETS, ModelConfig
from stacklm.model.count import count
from support import ROOT
from support.checkout import TINY_PARAMS, run_main

CPU = torch.device("cpu")
SHIPPED = {path.stem.removesuffix("-8GB"): path for path in (ROOT / "docs" / "params").glob("*.yaml")}


def test_the_audit_of_every_model_is_measured_against_a_step_of_its_training(tmp_path: Path):
    (tmp_path / "params.yaml").write_text(TINY_PARAMS)
    printed = run_main(audit.main, "--params", str(tmp_path / "params.yaml"), "--rounds", "1")
    rows = {line.split()[0]: line.split() for line in printed.splitlines()[2:]}
    assert rows and all(float(row[1]) > 0 and float(row[-1]) > 1 for row in rows.values())
    assert all(f"  {name}:" in TINY_PARAMS for name in rows)


def test_decoding_is_measured_by_each_way_that_is_exact_with_the_bytes_of_its_cache(tmp_path: Path):
    options = ["--contexts", "8", "--repeats", "1", "--threads", "1", "--device", "cpu", "--json", str(tmp_path / "rows.json")]
    printed = run_main(decode.main, *options)
    rows = read_json(tmp_path / "rows.json")
    found = {(row["model"].split()[0], row["way"]): row["bytes_per_token"] for row in rows}
    keys, values = 2 * 16 * 128, 16 * 4 * (8 + 16)
    assert found == {
        ("stacked", "keys and values"): 4 * (keys + values),
        ("stacked", "stack inputs"): 4 * 2 * 128,
        ("stacked", "recompute"): 0,
        ("dense", "keys and values"): 4 * 10 * 2 * 160,
        ("dense", "recompute"): 0,
    }
    assert all(row["milliseconds"] > 0 for row in rows)
    assert len(printed.splitlines()) == 2 + len(rows)


def test_a_preset_is_built_and_trained():
    config = Train(max_steps=100, context_length=8, global_batch_size=2, micro_batch_size=1)
    model = Model(Stacked(16, 2, (Stack(4, 4, 16), Stack(4, 8, 32))), Adafactor())
    found = presets.measure(config, model, 1000, CPU, steps=2)
    assert found["parameters"] == found["counted"]
    assert found["loss"] == pytest.approx(found["uniform"], rel=0.05)
    assert found["step_seconds"] > 0 and found["grad_norm"] > 0 and found["peak"] > 0


def test_shipped_params_are_the_presets_made_lean():
    assert set(SHIPPED) == set(PRESETS)
    for name, path in SHIPPED.items():
        train, model, vocab_size = presets.settings(str(path), 1)
        assert ModelConfig(model.architecture, vocab_size, train.context_length) == PRESETS[name]
        assert train.tokens_per_step == 4096
        assert isinstance(model.optimizer, Adafactor)


def test_all_forms_of_a_step_take_turns_and_what_a_file_holds_is_not_measured_again(tmp_path: Path):
    options = ["--sizes", "tiny", "--repeats", "1", "--threads", "1", "--json", str(tmp_path / "found.json")]
    command = [sys.executable, "benchmarks/step.py", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    rows = {row["form"]: row for row in read_json(tmp_path / "found.json")["tiny"]["rows"]}
    assert list(rows) == ["published", "plain loop", "packed", "folded", "checkpointed"]
    assert all(row["wall"] > 0 and row["turns"] == 1 and row["peak"] > 0 for row in rows.values())
    assert rows["packed"]["operations"] == rows["plain loop"]["operations"]
    assert rows["folded"]["operations"] < rows["checkpointed"]["operations"]
    assert len(done.stdout.splitlines()) == 3 + len(rows) + 1
    assert run_main(step.main, *options) == done.stdout


def test_a_form_of_a_step_that_computes_something_else_is_found():
    wanted = step.Step("plain loop", step.SIZES["tiny"], CPU).digest()
    step.check("the same", wanted, wanted)
    turned = step.Digest(wanted.logits, wanted.norms, -wanted.directions, 0)
    longer = step.Digest(wanted.logits, 1.5 * wanted.norms, wanted.directions, 0)
    other = step.Digest(np.zeros_like(wanted.logits), wanted.norms, wanted.directions, 0)
    for what, found in (("logits", other), ("lengths", longer), ("directions", turned)):
        with pytest.raises(AssertionError, match=f"differ by .* in .*{what}"):
            step.check("other", found, wanted)


@pytest.mark.parametrize("name", ["small", "medium"])
def test_the_dense_model_costs_what_the_textbooks_does(name: str):
    size = throughput.SIZES[name]
    with torch.device("meta"):
        textbook = throughput.Textbook(size)
    counts = {kind: count(architecture, size.vocab_size, size.context) for kind, architecture in size.ours.items()}
    assert counts["dense"].training_flops_per_token == textbook.training_flops_per_token(size.context)
    assert counts["dense"].total == pytest.approx(throughput.parameters_of(textbook), rel=0.05)
    assert counts["stacked"].total == pytest.approx(counts["dense"].total, rel=0.01)


def test_all_learn_from_the_same_batches_and_are_timed_in_turns(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    ours = {"dense": Dense(16, 2, 1, 64), "stacked": Stacked(16, 2, (Stack(2, 8, 16),))}
    size = throughput.Size(layers=1, width=16, heads=2, context=8, batch=4, ours=ours, steps=3)
    config = Train(max_steps=100, context_length=8, global_batch_size=4, micro_batch_size=4, warmup_steps=1)
    batches = TrainBatches(throughput.library(tmp_path / "tokens.bin"), 8, 4, config.seed)
    runners = [
        throughput.textbook(size, config, batches, CPU),
        *(throughput.ours(kind, size, config, batches, CPU) for kind in ours),
    ]
    rows = throughput.compare("tiny", size, runners, rounds=1, device=CPU)
    assert [row["model"] for row in rows] == ["textbook", "dense", "stacked"]
    assert rows[0]["ratio"] == rows[0]["cpu_ratio"] == rows[0]["equal_loss"] == 1
    assert all(row["tokens_per_second"] == 3 * 4 * 8 / row["wall"] and row["loss"] < 6 for row in rows)
    assert capsys.readouterr().out.startswith("tiny: 1 layers, 16 wide, context 8, batch 4; matrices ")
    assert throughput.loader(batches, count=3) > 0


def test_the_textbooks_model_does_not_look_ahead():
    model = throughput.Textbook(throughput.Size(layers=2, width=16, heads=2, context=8, batch=1, ours={}, steps=1))
    ids_BT = torch.randint(throughput.END, (2, 8))
    ids_BT[1, :5] = ids_BT[0, :5]
    first, second = model(ids_BT)
    torch.testing.assert_close(first[:5], second[:5])
    assert (first[5:] != second[5:]).any()


def test_all_forms_of_the_loss_agree():
    torch.manual_seed(0)
    model, targets_BT = loss.Features(40, 8, 30), torch.randint(30, (1, 40))
    wanted = F.cross_entropy(model.head(model.x_RC), targets_BT[0]).item()
    for name, form in loss.FORMS.items():
        assert loss.step(model, targets_BT, form) == pytest.approx(wanted, rel=1e-5), name
        assert model.head.weight.grad.any() and model.x_RC.grad.any()


def test_characters_are_split_in_their_order():
    vocab_size, train, valid = shakespeare.streams("to be or not to be, " * 10)
    assert vocab_size == 1 + len(set("to be or not to be, "))
    assert (len(train), len(valid)) == (180, 20)
    assert train[:20].tolist() == valid[:20].tolist() == train[160:180].tolist()
    assert min(train[:180]) == 1 and max(train[:180]) == vocab_size - 1
