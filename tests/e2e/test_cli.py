"""Commands as run by a user, in a trained project and in an untrained one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from stacklm.config.params import load
from stacklm.files import read_json, sha256
from stacklm.model.store import load_model, save_model
from support.checkout import Checkout, write_project
from support.prose import blocks


@pytest.fixture
def untrained(tmp_path: Path) -> Checkout:
    """A project of settings alone."""
    return Checkout(write_project(tmp_path / "project").root)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("audit out", "a model is a folder with config.json and model.safetensors"),
        ("benchmark", "no benchmark: name a file"),
        ("benchmark --blimp gone.jsonl", "gone.jsonl: no such file"),
        ("export hf exported dens", "no model 'dens'; there are stacked-1, dense-1"),
        ("generate a --model dens", "no model 'dens'; there are stacked-1, dense-1 (did you mean `dense`?)"),
        ("generate a --top-p 2", "top_p: 2.0 is not allowed"),
        ("generate a --model dense --cache inputs", "inputs of Attention are not enough"),
        ("serve --model dens", "no model 'dens'; there are stacked-1, dense-1"),
        ("serve --host 192.0.2.1", "cannot listen on 192.0.2.1"),
        ("variants --model dense", "dense is not a stacked model"),
        ("variants --model dens", "no model 'dens'"),
        ("variants --preset x", "no preset 'x'; choose one of seed-2x64, seed-4x8"),
    ],
)
def test_what_cannot_be_is_one_clear_message(finished: Checkout, command: str, message: str) -> None:
    assert message in finished.cli(*command.split(), code=2)
    assert not (finished.root / "exported").exists()


@pytest.mark.parametrize("command", ["export hf exported stacked", "generate a", "serve"])
def test_a_model_that_is_not_trained_yet_is_named(untrained: Checkout, command: str) -> None:
    assert "stacked-1 is not trained yet: `dvc repro pretrain@stacked-1`" in untrained.cli(*command.split(), code=2)
    assert not (untrained.root / "exported").exists()


def test_a_family_of_variants_is_made_around_a_model_or_a_preset(untrained: Checkout) -> None:
    text = untrained.cli("variants")
    assert "vocabulary 300, context 16" in text and "as many parameters" in text
    assert text == untrained.cli("variants", "--model", "stacked")
    assert " 436,967,344 " in untrained.cli("variants", "--preset", "seed-2x64", "--axis", "flops")


def test_the_models_of_a_project_are_audited_with_the_weights_they_have(finished: Checkout, tmp_path: Path) -> None:
    printed = finished.stacklm("audit", "--out", str(tmp_path))  # in a process of its own, as a user has it
    for name in ("stacked", "dense"):
        assert f"audit {name}: all 15 checks passed" in printed
        certificate = read_json(tmp_path / f"{name}.json")
        assert certificate["passed"]
        assert {check["of"] for check in certificate["checks"]} == {"trained weights", "batches and loss", "learning"}
        assert certificate["subject"] == read_json(finished.root / "out/audits" / f"{name}.json")["subject"]


def test_one_model_without_weights_is_audited(untrained: Checkout) -> None:
    untrained.cli("audit", "--model", "dense")
    certificate = read_json(untrained.root / ".stacklm/audits/dense.json")
    assert certificate["checks"][9]["of"] == "briefly trained weights"


def test_a_folder_with_a_fault_is_told_by_the_exit_code_of_the_audit(finished: Checkout, tmp_path: Path) -> None:
    model, config = load_model(finished.root / "out/models/dense-1")
    model.norm.weight.data.fill_(3e38)  # finite, but its logits are not
    save_model(tmp_path / "broken", model, config.architecture, config.vocab_size, config.context_length)
    printed = finished.cli("audit", str(tmp_path / "broken"), "--out", str(tmp_path), code=1)
    assert "FAULT  finite     not finite: in training mode logits at positions 0, 1" in printed
    assert read_json(tmp_path / "broken.json")["passed"] is False


def test_the_prompt_may_come_from_standard_input_and_the_seed_decides(finished: Checkout) -> None:
    text = finished.stacklm("generate", "import os", "--max-new-tokens", "12")  # in a process of its own, as a user has it
    assert text == finished.cli("generate", "--max-new-tokens", "12", stdin=b"import os")
    assert text == finished.cli("generate", "import os", "--max-new-tokens", "12", "--cache", "inputs", "--model", "stacked")
    assert len({text, finished.cli("generate", "import os", "--max-new-tokens", "12", "--seed", "7")}) == 2
    assert len(text) > 8


def test_bytes_that_are_not_utf_8_mean_the_same_as_an_argument_and_on_standard_input(finished: Checkout) -> None:
    texts = []
    for prompt in (b"caf\xe9 ", b"\xff\xfe\x80", "café ".encode()):
        texts.append(finished.cli("generate", os.fsdecode(prompt), "--max-new-tokens", "12"))
        assert texts[-1] == finished.cli("generate", "--max-new-tokens", "12", stdin=prompt)
    assert texts[0] != texts[2]


def test_top_k_and_temperature_reach_the_draws(finished: Checkout) -> None:
    best = finished.cli("generate", "def", "--model", "dense", "--temperature", "0")
    assert best == finished.cli("generate", "def", "--model", "dense", "--top-k", "1")
    assert best == finished.cli("generate", "def", "--model", "dense", "--top-p", "1e-9", "--seed", "3")


def test_a_trained_model_is_exported_with_a_card_that_says_how_to_repeat_it(finished: Checkout, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    text = finished.cli("export", "hf", str(tmp_path / "hf"), "dense", "--license", "MIT")
    assert f"wrote {tmp_path / 'hf'}" in text
    card = (tmp_path / "hf/README.md").read_text()
    front = YAML(typ="safe").load(card.split("---")[1])
    assert front["license"] == "mit" and front["pipeline_tag"] == "text-generation"
    names = {path.name for path in (tmp_path / "hf").iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "SHA256SUMS"} <= names
    (settings,) = blocks(card, "yaml")
    (tmp_path / "params.yaml").write_text(settings)
    again, params = load(tmp_path / "params.yaml"), load(finished.root / "params.yaml")
    assert (again.data, again.tokenizer, again.train, again.seeds) == (params.data, params.tokenizer, params.train, (1,))
    assert again.models == {"dense": params.models["dense"]}


def test_a_model_is_loaded_by_name_and_by_an_alias_that_it_was_given(finished: Checkout, tmp_path: Path) -> None:
    checkout = finished.copy(tmp_path / "project")
    text = checkout.cli("load", "dense-1")
    assert "path                 out/models/dense-1\n" in text and text.count("as recorded\n") == 6
    assert sha256(finished.root / "out/tokenizer")[:12] in text
    assert "models:/stacklm@production" in checkout.cli("register", "dense", "--alias", "production", "--license", "mit")
    text = checkout.cli("load", "models:/stacklm@production")
    assert text.count("as recorded\n") == 5
    assert "champion" in checkout.cli("register", "dense", "--alias", "champion", code=2)
    assert "nope not found" in checkout.cli("load", "models:/stacklm@nope", code=2)


def test_dvc_brings_the_models_of_a_tag(finished: Checkout, tmp_path: Path) -> None:
    checkout = finished.copy(tmp_path / "project")
    checkout.run("git", "tag", "-a", "models@v1.0.0", "-m", "first")
    checkout.run("dvc", "artifacts", "get", ".", "models", "--rev", "v1.0.0", "-o", "brought")
    assert sha256(checkout.root / "brought") == sha256(checkout.root / "out/models")


@pytest.mark.slow
def test_a_gate_with_real_trainings_gives_a_script_one_object_and_an_exit_code_and_the_same_answer_again(finished, tmp_path):
    project = finished.copy(tmp_path / "project")
    options = ["--rates", "3", "--looks", "3,4", "--steps", "8", "--yes", "--json"]
    command = [sys.executable, "-m", "stacklm", "try", "stacked", *options]
    answers = []
    for _ in range(2):
        done = subprocess.run(command, cwd=project.root, env=project.environment, capture_output=True, text=True)
        answers.append(json.loads(done.stdout))
        assert done.returncode == answers[-1]["exit_code"] in (0, 3, 4, 5), done.stderr
        assert "audit: baseline passed all" in done.stderr and answers[-1]["sentence"] in done.stderr
    assert {k for k in answers[0] if answers[0][k] != answers[1][k]} <= {"sentence", "more_seconds"}  # these say how long
    records = project.root / "experiments" / "try-stacked" / "records"
    assert len([*records.iterdir()]) >= 2 * (3 + answers[0]["seeds"])
    trial = next(records.iterdir()).stem
    assert "the record is reproduced" in project.cli("verify", "try-stacked", trial)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="memory is limited by the shell's ulimit")
def test_training_beyond_the_memory_ends_with_settings_that_fit(checkout: Checkout) -> None:
    checkout.set("train.global_batch_size=2048", "train.micro_batch_size=2048", "models.dense.architecture.d_ff=20000")
    stage = f'"{sys.executable}" -m stacklm stage'
    said = checkout.run("sh", "-c", f"ulimit -v 5000000; {stage} audit dense && {stage} pretrain dense 1", code=None)
    assert "pretrain@dense-1 ran out of memory; its checkpoints are intact. It does not fit in 5.12 GB" in said
    assert "train.micro_batch_size=" in said
    assert "Traceback" not in said
