"""The checks of batches and losses pass the project's own, and name planted faults."""

import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from stacklm.audit import Fault
from stacklm.audit.data import (
    BATCH,
    CHECKS,
    Machinery,
    counting,
    floor,
    labels,
    learn,
    padding,
    sequences,
    sizes,
    splits,
    train_briefly,
    uniform,
)
from stacklm.config.tokenizer import TokenizerConfig
from stacklm.config.train import Train
from stacklm.data import DataError, encode, tokenizer
from stacklm.data.batches import TrainBatches
from stacklm.data.documents import SPLITS, TextRecord, read_split
from stacklm.data.shards import Shards
from stacklm.files import read_json, write_json
from stacklm.model.build import build
from stacklm.train.validate import score
from support.audit_faults import (
    ARCHITECTURES,
    MODEL_FAULTS,
    Copies,
    Overlapping,
    Repeating,
    ShiftedTwice,
    builder,
    careless_score,
    shifted_evaluation,
    unmasked,
)
from support.corpus import write_documents
from support.train_files import write_text

TRAIN = Train(max_steps=2, warmup_steps=1, context_length=8, global_batch_size=3, micro_batch_size=3)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_ours_pass(check):
    assert check(Machinery(), TRAIN)


class TwoAhead(TrainBatches):
    def batch(self, step):
        inputs_BT, targets_BT = super().batch(step)
        return inputs_BT, (targets_BT + 1) % 64  # in a stream that counts


class Mixed(TrainBatches):
    def batch(self, step):
        inputs_BT, targets_BT = super().batch(step)
        targets_BT[0, 0] = inputs_BT[0, 0]
        return inputs_BT, targets_BT


FAULTS = [
    (labels, Machinery(train_batches=Copies), "shifted labels: in training the loss asks for the token 0 positions on"),
    (labels, Machinery(train_batches=TwoAhead), "shifted labels: in training the loss asks for the token 2 positions on"),
    (labels, Machinery(train_batches=Mixed), "shifted labels: in training the loss asks for no one position"),
    (
        labels,
        Machinery(evaluation_batches=shifted_evaluation),
        "shifted labels: in evaluation the loss asks for the token 0 positions",
    ),
    (labels, Machinery(objective=ShiftedTwice), "shifted labels: in training the loss asks for the token 2 positions on"),
    (sequences, Machinery(train_batches=Overlapping), "sequences overlap: of 8 tokens each, they begin as near as 4 apart"),
    (sequences, Machinery(train_batches=Repeating), "sequences are not seen once an epoch: in 2 epochs of 96 tokens, 24 of them"),
    (padding, Machinery(evaluation_batches=unmasked), "padding inside the loss: 72 tokens were scored in a stream of 60"),
    (
        padding,
        Machinery(score=careless_score),
        "padding inside the loss: 60 tokens were scored in a stream of 60, with a mean loss of",
    ),
]


@pytest.mark.parametrize(("check", "machinery", "fault"), FAULTS, ids=[fault[:60] for _, _, fault in FAULTS])
def test_planted_faults_are_named(check, machinery, fault):
    with pytest.raises(Fault, match=re.escape(fault)):
        check(machinery, TRAIN)


def in_bytes(*arguments):
    """A score that counts special tokens as text."""
    result = score(*arguments)
    return replace(result, text_nats=result.nats)


def test_wrong_units_are_named():
    with pytest.raises(Fault, match=r"^wrong units: a uniform model over 64 tokens has a bits_per_byte of 4.\d+, not 3.0"):
        uniform(Machinery(score=in_bytes), TRAIN)


def test_splits_that_share_no_document_pass(tmp_path: Path):
    data = Shards.open(write_text(tmp_path))
    assert splits(data) == "25 documents for validation and test, 65 in all"
    assert sizes(data).startswith("train ")


@pytest.mark.parametrize(("one", "other"), [("train", "valid"), ("train", "test"), ("test", "valid")])
def test_one_document_in_two_splits_is_found(tmp_path: Path, one: str, other: str):
    ids = {name: Shards.open(write_text(tmp_path)).split(name)[:].astype("<u2") for name in (one, other)}
    shared = np.concatenate([ids[one][:10], ids[other]])
    with pytest.raises(Fault, match=r"^splits overlap: document \d+ of those of \w+ is also in \w+"):
        splits(Shards.open(write_text(tmp_path, **{other: shared})))


def test_tokens_that_do_not_stand_for_the_text_are_found(tmp_path: Path):
    manifest = read_json(write_text(tmp_path) / "manifest.json")
    manifest["splits"]["valid"]["bytes"] += 1
    write_json(tmp_path / "manifest.json", manifest)
    with pytest.raises(Fault, match=r"^wrong sizes: the tokens of valid stand for \d+ bytes in 15 documents"):
        sizes(Shards.open(tmp_path))


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    """Three splits of words that no other split has."""
    texts = {split: [f"{split} {i} says {i * i} of {split} ".encode() * 5 for i in range(20)] for split in SPLITS}
    return write_documents(tmp_path / "documents", texts)


def prepared(documents: Path) -> Shards:
    """The stages `tokenizer` and `shards`."""
    folder = documents.parent
    tokenizer.train_tokenizer(TokenizerConfig(262), documents, folder / "tokenizer")
    encode.write_shards(documents, folder / "tokenizer", folder / "shards")
    return Shards.open(folder / "shards")


def another_split(instead: dict[str, str]):
    """`read_split` with the fault that it reads another split."""
    return lambda folder, split: read_split(folder, instead.get(split, split))


def test_the_text_that_a_tokenizer_was_trained_on_is_recorded(documents: Path):
    data = prepared(documents)
    assert splits(data) and sizes(data)
    text = TextRecord()
    for document in read_split(documents, "train"):
        text.add(document)
    assert read_json(documents.parent / "tokenizer" / "record.json") == {"trained_on": text.plain()}
    assert (text.documents, text.bytes) == (20, data.splits["train"]["bytes"])


@pytest.mark.parametrize("split", ["valid", "test"])
def test_a_tokenizer_that_was_trained_on_another_split_is_refused(documents: Path, monkeypatch, split: str):
    monkeypatch.setattr(tokenizer, "read_split", another_split({"train": split}))
    with pytest.raises(DataError, match=r"tokenizer: trained on another text than the train split: .*run the stage `tokenizer`"):
        prepared(documents)


def test_a_tokenizer_that_was_trained_on_more_than_the_train_split_is_refused(documents: Path, monkeypatch):
    monkeypatch.setattr(tokenizer, "read_split", lambda folder, _: (d for split in SPLITS for d in read_split(folder, split)))
    with pytest.raises(DataError, match=r"trained on another text than the train split: \{'documents': 60, "):
        prepared(documents)


def test_a_tokenizer_without_a_record_is_refused(documents: Path):
    prepared(documents)
    (documents.parent / "tokenizer" / "record.json").unlink()
    with pytest.raises(DataError, match=r"tokenizer: no record\.json; run the stage `tokenizer`"):
        encode.write_shards(documents, documents.parent / "tokenizer", documents.parent / "again")


@pytest.mark.parametrize("split", ["valid", "test"])
def test_validation_and_test_on_train_text_are_found(documents: Path, monkeypatch, split: str):
    monkeypatch.setattr(encode, "read_split", another_split({split: "train"}))
    with pytest.raises(Fault, match=rf"^splits overlap: document \d+ of those of train is also in {split}"):
        splits(prepared(documents))


def test_training_on_the_text_of_another_split_is_refused(documents: Path, monkeypatch):
    monkeypatch.setattr(encode, "read_split", another_split({"train": "test"}))
    with pytest.raises(DataError, match=r"trained on another text than the train split"):
        prepared(documents)


both_kinds = pytest.mark.parametrize("kind", ARCHITECTURES)


def fresh(kind, build=build):
    def make(vocab_size, context):
        torch.manual_seed(0)
        return build(ARCHITECTURES[kind], vocab_size, context)

    return make


@both_kinds
def test_our_models_stay_at_ln_v(kind):
    found = floor(fresh(kind), Machinery())
    assert 0 < float(found.split()[0]) < 0.05
    assert found == floor(fresh(kind), Machinery())


@both_kinds
@pytest.mark.parametrize("fault", ["upper-triangular mask", "mask missing in training mode", "convolution padded off by one"])
def test_a_model_that_sees_the_answer_goes_below(kind, fault):
    with pytest.raises(
        Fault, match=r"^below the floor: a loss of [01]\.\d+ nats on random tokens, .* the model is told the answer"
    ):
        floor(fresh(kind, builder(MODEL_FAULTS[fault])), Machinery())


@both_kinds
def test_labels_that_are_the_inputs_go_below(kind):
    with pytest.raises(Fault, match=r"^below the floor"):
        floor(fresh(kind), Machinery(train_batches=Copies))


@both_kinds
def test_what_can_be_learnt_is_learnt(kind):
    model = fresh(kind)(16, 8)
    losses = learn(model, counting(BATCH * 8, 16), 8, 60, Machinery())
    assert losses[0] == pytest.approx(math.log(16), abs=0.3)
    assert losses[-1] < 1


def test_brief_training_changes_every_weight():
    model = fresh("dense")(16, 8)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train_briefly(model, 16, 8, Machinery())
    assert not any(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
