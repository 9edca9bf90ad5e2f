"""A certificate is valid for one model and the code that was audited."""

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from stacklm.code import ROOT, import_closure, units
from stacklm.config.params import load
from stacklm.config.schema import plain
from stacklm.files import read_json, write_json
from stacklm.model.build import ModelConfig
from stacklm.pipeline.stages import stage
from stacklm.train import NotCertifiedError
from stacklm.train.certificate import AUDITED, check_certificate, form_of
from support.checkout import TINY_PARAMS
from support.train_files import MODELS, TRAIN, VOCAB, write_certificate, write_cycle

SUBJECT = ModelConfig(MODELS["dense"].architecture, VOCAB, TRAIN.context_length)


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    return write_certificate(tmp_path / "certificate.json", MODELS["dense"], TRAIN.context_length)


def test_the_right_one_is_accepted(certificate: Path):
    check_certificate(certificate, SUBJECT, TRAIN)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"passed": False}, "says that it is not causal"),
        ({"passed": "no"}, "says that it is not causal"),
        ({"subject": plain(SUBJECT) | {"context_length": 17}}, "is about another model"),
        ({"form": form_of(replace(TRAIN, precision="bf16"))}, "is about another form of training .*"),
        ({"code": "5f" * 32}, "is about other code: the model, the batches or the loss changed since"),
    ],
)
def test_one_of_something_else_is_refused(certificate: Path, change: dict, why: str):
    write_json(certificate, read_json(certificate) | change)
    with pytest.raises(NotCertifiedError, match=rf"certificate.json {why}, so the model is not trained; run the stage `audit`"):
        check_certificate(certificate, SUBJECT, TRAIN)


@pytest.mark.parametrize("key", ["passed", "subject", "form", "code"])
def test_one_without_a_key_is_refused(certificate: Path, key: str):
    write_json(certificate, {name: value for name, value in read_json(certificate).items() if name != key})
    with pytest.raises(NotCertifiedError, match=r"is incomplete or from an earlier version"):
        check_certificate(certificate, SUBJECT, TRAIN)


@pytest.mark.parametrize(
    ("content", "why"),
    [(None, "is not there"), (b"{", "is damaged"), (b"\xff", "is damaged"), (b"[]", "is incomplete or from an earlier version")],
)
def test_one_that_cannot_be_read_is_refused(tmp_path: Path, content: bytes | None, why: str):
    if content is not None:
        (tmp_path / "certificate.json").write_bytes(content)
    with pytest.raises(NotCertifiedError, match=why):
        check_certificate(tmp_path / "certificate.json", SUBJECT, TRAIN)


def test_the_audit_runs_again_whenever_the_audited_code_changes():
    """Else DVC would keep a certificate that training refuses."""
    assert units(AUDITED).items() <= stage("audit").code(ROOT).items()


@pytest.mark.parametrize(
    "file",
    ["model/kernels/attention.py", "data/batches.py", "model/stacked.py", "train/loss.py", "train/device.py", "train/validate.py"],
)
def test_what_is_audited_is_bound(file: str):
    assert f"stacklm/{file}" in set().union(*map(import_closure, AUDITED))


def test_training_alone_refuses_an_old_certificate_after_the_code_changed(tmp_path: Path):
    """As `python -m stacklm.train` is run on a machine without the pipeline."""
    shutil.copytree(ROOT / "stacklm", tmp_path / "stacklm", ignore=shutil.ignore_patterns("__pycache__"))
    shards = write_cycle(tmp_path / "shards")
    (tmp_path / "params.yaml").write_text(TINY_PARAMS)
    params = load(tmp_path / "params.yaml")
    subject = params.models["dense"], params.train.context_length
    certificate = write_certificate(tmp_path / "certificate.json", *subject, config=params.train)
    command = [sys.executable, "-m", "stacklm.train", "--model", "dense", "--shards", shards, "--certificate", certificate]

    def train() -> subprocess.CompletedProcess:
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    with (tmp_path / "stacklm/model/dense.py").open("a") as file:
        file.write("\nDenseDecoder.forward = lambda self, ids_BT: self.head(self.features(ids_BT).roll(-1, 1))\n")
    done = train()
    assert done.returncode == 1
    assert "certificate.json is about other code" in done.stderr
    assert not (tmp_path / "out").exists()
    shutil.copyfile(ROOT / "stacklm/model/dense.py", tmp_path / "stacklm/model/dense.py")
    done = train()
    assert done.returncode == 0, done.stderr
