"""A trial: trained once, resumed, scored document by document."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from stacklm.code import import_closure
from stacklm.data.batches import evaluation_batches
from stacklm.data.shards import Shards
from stacklm.files import read_json, sha256
from stacklm.lab.trial import DocumentScores, Trial, read_documents, read_groups, run_trial, score_documents
from stacklm.model.build import build
from stacklm.train.loss import token_losses
from stacklm.train.validate import score
from support.train_files import MODELS, TRAIN, VOCAB, write_text

TEN = replace(TRAIN, max_steps=10)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("lab") / "shards")


@pytest.fixture(scope="module")
def trial(shards: Path) -> Trial:
    return Trial(MODELS["dense"], TEN, data=sha256(shards / "manifest.json"), code="c")


def test_a_trial_is_trained_once_and_leaves_a_small_record(shards, trial, tmp_path, monkeypatch):
    record = run_trial(trial, shards, tmp_path)
    folder = tmp_path / "trials" / trial.identity
    assert record == read_json(folder / "record.json")
    assert (folder / "record.json").stat().st_size < 5_000
    assert record["identity"] == trial.identity and record["train"]["seed"] == TEN.seed
    assert record["weights"] == sha256(folder / "model" / "model.safetensors")
    scores = read_documents(folder)
    for split in ("valid", "test"):
        assert record[split] == {"bits_per_byte": scores[split].bits_per_byte, "documents": len(scores[split].nats_D)}
    groups, whole = read_groups(record), scores["test"].grouped()
    assert np.abs(groups.nats_D - whole.nats_D).max() <= 0.005 + 1e-9 and (groups.bytes_D == whole.bytes_D).all()
    assert record["machine"]["kernels"] == torch.backends.cpu.get_cpu_capability() and all(record["machine"].values())
    monkeypatch.setattr("stacklm.lab.trial.pretrain", None)  # nothing may be trained any more
    assert run_trial(trial, shards, tmp_path) == record


def test_trials_of_one_shape_share_a_certificate(shards, trial, tmp_path, monkeypatch):
    run_trial(trial, shards, tmp_path)
    monkeypatch.setattr("stacklm.lab.trial.audit", None)
    other = replace(trial, train=replace(TEN, seed=2))
    assert run_trial(other, shards, tmp_path)["weights"] != run_trial(trial, shards, tmp_path)["weights"]
    assert len(list((tmp_path / "certificates").iterdir())) == 1


def test_other_tokens_than_those_of_the_trial_are_refused(shards, trial, tmp_path):
    with pytest.raises(ValueError, match="does not hold the tokens of trial"):
        run_trial(replace(trial, data="other"), shards, tmp_path)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_documents_add_up_to_the_score_of_the_split(shards, batch_size):
    torch.manual_seed(0)
    model, data, context = build(MODELS["dense"].architecture, VOCAB, 16), Shards.open(shards), 16
    found = score_documents(model, data, "valid", context, batch_size)
    whole = score(model, evaluation_batches(data.split("valid"), context, 4), data.token_bytes)
    assert found.bytes_D.sum() == whole.bytes
    # sums of float32 losses in another order of batches: a rounding of each loss
    assert found.nats_D.sum() == pytest.approx(whole.text_nats, rel=16 * torch.finfo(torch.float32).eps)
    assert found.bits_per_byte == pytest.approx(found.nats_D.sum() / math.log(2) / whole.bytes)


def test_a_token_belongs_to_the_document_whose_end_comes_next(shards):
    torch.manual_seed(0)
    model, data = build(MODELS["dense"].architecture, VOCAB, 16), Shards.open(shards)
    stream = data.split("test")
    (inputs, targets, mask), *_ = evaluation_batches(stream, 16, 64)
    with torch.no_grad():
        nats = token_losses(model.eval(), inputs, targets)[mask].double().numpy()
    ids = targets[mask].numpy()
    ends = [0, *(np.flatnonzero(ids == stream.end_id) + 1)]
    found = score_documents(model, data, "test", 16, 64)
    for i, (start, end) in enumerate(pairwise(ends)):
        text = data.token_bytes[ids[start:end]] > 0
        assert found.bytes_D[i] == data.token_bytes[ids[start:end]].sum()
        assert found.nats_D[i] == pytest.approx(nats[start:end][text].sum())


@pytest.mark.parametrize(("documents", "groups"), [(3, 3), (200, 200), (201, 200), (1234, 200)])
def test_groups_hold_the_whole_text_in_order_and_are_of_nearly_equal_size(documents, groups):
    scores = DocumentScores(np.arange(1.0, documents + 1), np.ones(documents, np.int64))
    found = scores.grouped()
    assert len(found.nats_D) == groups and found.bits_per_byte == pytest.approx(scores.bits_per_byte)
    assert found.bytes_D.max() - found.bytes_D.min() <= 1
    assert (np.diff(found.nats_D / found.bytes_D) > 0).all()


def test_the_identity_of_a_trial_holds_no_code_that_plans_or_judges():
    """Else a change of the solver or of the statistics would part new trials from those that are there."""
    ours = {
        file for file in import_closure("stacklm.lab.trial") if file.startswith(("stacklm/lab", "stacklm/plan", "stacklm/report"))
    }
    assert ours == {f"stacklm/lab/{name}.py" for name in ("__init__", "answers", "trial")}
