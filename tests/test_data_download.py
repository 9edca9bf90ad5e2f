"""Splits of the documents."""

import json
import random
from itertools import chain
from pathlib import Path

import pytest

from stacklm.config.data import Data, FilesSource
from stacklm.data import DataError
from stacklm.data.documents import SPLITS, read_split
from stacklm.data.download import download
from stacklm.data.sources import list_inputs
from stacklm.files import read_json, sha256

TEXTS = [f"document {i}" for i in range(400)]


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def downloaded(texts, name="documents", valid=0.2, test=0.1):
    """The documents of each split, by name."""
    Path("a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    data = Data(FilesSource(paths=("a.jsonl",)), valid_fraction=valid, test_fraction=test)
    list_inputs(data, Path("inputs.json"))
    download(data, Path("inputs.json"), Path(name))
    return {split: [document.decode() for document in read_split(Path(name), split)] for split in SPLITS}


def test_every_document_is_in_exactly_one_split_of_about_the_share_asked_for():
    splits = downloaded(TEXTS)
    assert sorted(chain(*splits.values())) == sorted(TEXTS)
    assert 0.12 < len(splits["valid"]) / len(TEXTS) < 0.28
    assert 0.05 < len(splits["test"]) / len(TEXTS) < 0.15


def test_a_documents_place_depends_on_its_content_alone():
    before = downloaded(TEXTS)
    shuffled = TEXTS + [f"new {i}" for i in range(100)]
    random.Random(1).shuffle(shuffled)
    after = downloaded(shuffled, "other")
    for split in SPLITS:
        assert set(before[split]) == set(after[split]) & set(TEXTS)


def test_changing_one_fraction_leaves_the_other_split_alone():
    before = downloaded(TEXTS)
    more_valid = downloaded(TEXTS, "valid", valid=0.4)
    more_test = downloaded(TEXTS, "test", test=0.3)
    assert more_valid["test"] == before["test"]
    assert set(more_valid["valid"]) > set(before["valid"])
    assert more_test["valid"] == before["valid"]
    assert set(more_test["test"]) > set(before["test"])


def test_duplicates_and_empty_documents_are_dropped_and_counted():
    splits = downloaded([*TEXTS, "", *TEXTS[:30], "", TEXTS[0]])
    assert sorted(chain(*splits.values())) == sorted(TEXTS)
    record = read_json(Path("documents/record.json"))
    assert (record["duplicates"], record["empty"]) == (31, 2)


def test_the_record_holds_counts_inputs_and_source():
    splits = downloaded(TEXTS)
    record = read_json(Path("documents/record.json"))
    counts = {s: {"documents": len(texts), "bytes": sum(map(len, texts))} for s, texts in splits.items()}
    assert record["splits"] == counts
    assert record["files"] == [{"name": "a.jsonl", "bytes": Path("a.jsonl").stat().st_size, "sha256": sha256(Path("a.jsonl"))}]
    assert record["source"]["paths"] == ["a.jsonl"]


def test_equal_inputs_give_equal_bytes():
    downloaded(TEXTS, "one")
    downloaded(TEXTS, "two")
    assert sha256(Path("one")) == sha256(Path("two"))


def test_a_split_without_documents_is_an_error_and_leaves_nothing():
    with pytest.raises(DataError, match=r"split valid has no document: the source gave 3, .* change the fractions"):
        downloaded(TEXTS[:3], valid=0.001)
    assert not Path("documents/record.json").exists()
    assert not any(Path("documents").glob("*.parquet"))


def test_a_list_of_another_source_is_refused():
    downloaded(TEXTS)
    with pytest.raises(DataError, match=r"inputs\.json lists another source than data\.source says"):
        download(Data(FilesSource(paths=("a.jsonl",), document_bytes=1)), Path("inputs.json"), Path("other"))
