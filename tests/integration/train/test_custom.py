"""Models from a file: training that is unchanged by a kill, evaluation, generation, and weights that only their own code loads."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest
import torch

from stacklm.audit.audit import certify
from stacklm.config.evaluate import Sample
from stacklm.config.model import Model, Python
from stacklm.config.schema import ParamsError
from stacklm.data.shards import Shards
from stacklm.evaluate.evaluate import evaluate_split
from stacklm.evaluate.generate import generate
from stacklm.files import read_json, write_json
from stacklm.model.build import ModelConfig, build
from stacklm.model.cache import Decoder
from stacklm.model.store import StoreError, load_model
from support import ROOT
from support.custom_models import FOLDER, MODELS, every_model, written
from support.prose import blocks
from support.train_files import OPTIMIZER, TRAIN, VOCAB, Lab


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("lab"))


@every_model
def test_a_killed_training_resumes_to_the_bit_and_the_model_is_judged_and_writes(lab: Lab, name: str) -> None:
    model = Model(MODELS[name], OPTIMIZER)
    assert lab.run(name, model) == 0
    assert lab.run(f"killed-{name}", model, die=(signal.SIGKILL, "stacklm.train.trainer:train_step", 13)) == -signal.SIGKILL
    assert lab.run(f"killed-{name}", model) == 0
    assert "resuming after step 10 of 24" in lab.log(f"killed-{name}")
    assert lab.result(f"killed-{name}") == lab.result(name)
    rows = lab.rows(name)
    assert rows[-1]["valid_loss"] < 0.8 * rows[0]["valid_loss"]
    assert rows[24]["flops"] == 24 * rows[1]["flops"] > 0
    trained, config = load_model(lab.root / name / "trained")
    assert config.architecture == MODELS[name]
    figures = evaluate_split(trained, Shards.open(lab.shards), "test", config.context_length, 4)
    assert figures["loss"] < rows[0]["valid_loss"]
    decoder = Decoder(trained.eval(), config.context_length)
    texts = [list(generate(decoder, [3, 1, 4], Sample(max_new_tokens=TRAIN.context_length, seed=seed))) for seed in (1, 1)]
    assert texts[0] == texts[1]
    assert all(0 <= token < VOCAB for text in texts for token in text)


def test_the_example_of_the_page_is_twenty_lines_and_trains_and_its_error_is_the_one_shown(lab: Lab, tmp_path: Path) -> None:
    page = (ROOT / "docs/your-model.md").read_text(encoding="utf-8")
    (example,), (shown,) = blocks(page, "python"), blocks(page, "text")
    assert len(example.splitlines()) <= 20
    (tmp_path / "my_model.py").write_text(example)
    model = Model(Python(str(tmp_path / "my_model.py"), "MyModel", settings={"width": 16}), OPTIMIZER)
    assert certify(ModelConfig(model.architecture, VOCAB, TRAIN.context_length), TRAIN).faults == []
    assert lab.run("page", model) == 0
    assert lab.rows("page")[-1]["valid_loss"] < 0.8 * lab.rows("page")[0]["valid_loss"]
    (tmp_path / "my_model.py").write_text(example.replace("nn.Linear(2 * width, width)", "nn.Linear(width, width)"))
    broken = build(Python(str(tmp_path / "my_model.py"), "MyModel"), VOCAB, 64)
    with pytest.raises(ParamsError) as error:
        broken(torch.zeros(8, 64, dtype=torch.long))
    assert f"stacklm: {error.value}\n" == shown


def test_blocks_computed_twice_train_to_the_same_model_up_to_rounding(lab: Lab) -> None:
    model = Model(MODELS["gpt"], OPTIMIZER)
    assert lab.run("twice", model, activation_checkpointing="full", max_steps=8) == 0
    assert lab.run("once", model, max_steps=8) == 0
    losses = [[row["train_loss"] for row in lab.rows(name)[1:]] for name in ("once", "twice")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_the_files_hold_parameters_by_the_users_names_and_the_code_that_was_trained(lab: Lab, tmp_path: Path) -> None:
    for file in ("linear_attention.py", "layers.py"):
        shutil.copy(FOLDER / file, tmp_path)
    architecture = Python(str(tmp_path / "linear_attention.py"), "Gated")
    assert lab.run("own", Model(architecture, OPTIMIZER), max_steps=8) == 0
    folder = lab.root / "own" / "trained"
    code = read_json(folder / "config.json")["code"]
    assert {"linear_attention.py Gated.decode", "layers.py Scale.forward"} <= code.keys()
    model, _ = load_model(folder)
    assert torch.equal(model.net.output.weight, load_model(folder)[0].net.output.weight)
    (folder / "linear_attention.py").write_text("raise SystemExit('executed')")  # what lies beside the weights is never run
    load_model(folder)
    config = read_json(folder / "config.json")
    beside = {**config["architecture"], "path": str(folder / "linear_attention.py")}
    write_json(folder / "config.json", config | {"architecture": beside})
    with pytest.raises(StoreError, match=r"lies in the model's own folder, from which none is run"):
        load_model(folder)
    write_json(folder / "config.json", config)
    text = (tmp_path / "layers.py").read_text()
    (tmp_path / "layers.py").write_text(text.replace("1e-6", "1e-5"))
    with pytest.raises(StoreError, match=r"layers\.py Scale\.forward changed since this model was trained; bring back"):
        load_model(folder)
    (tmp_path / "layers.py").write_text(text.replace("class Scale", "# the same but for a comment\nclass Scale"))
    load_model(folder)


def test_buffers_that_are_drawn_are_kept(lab: Lab, tmp_path: Path) -> None:
    drawn = ("self.head =", "self.register_buffer('noise', torch.randn(width))\n        self.head =")
    model = Model(written(tmp_path, drawn, ("x.cumsum(1)", "x.cumsum(1) * self.noise")), OPTIMIZER)
    assert lab.run("drawn", model, max_steps=8) == 0
    noises = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        noises.append(load_model(lab.root / "drawn" / "trained")[0].net.noise)
    assert torch.equal(*noises)
