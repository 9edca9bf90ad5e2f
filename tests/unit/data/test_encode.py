"""Encoding documents as shards."""

import os
from pathlib import Path

import numpy as np
import pytest

from stacklm.config.data import FilesSource
from stacklm.data import encode
from stacklm.data.documents import SPLITS, read_split
from stacklm.data.encode import write_shards
from stacklm.data.shards import Shards
from stacklm.data.tokenizer import Tokenizer
from stacklm.files import read_json, sha256
from support import ROOT
from support.corpus import prepare_tokenizer, write_texts

SHARED = Path(os.environ.get("STACKLM_SHARED", ROOT.parent / "shared")) / "data"
TEXTS = [f"document {i} says\tthe number {i * i} is\na  square é" * (1 + i % 5) for i in range(200)]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    root = tmp_path_factory.mktemp("prepared")
    write_texts(root / "a.jsonl", TEXTS)
    prepare_tokenizer(root, FilesSource(paths=("a.jsonl",)), 300)
    return root


def written(prepared, folder):
    write_shards(prepared / "documents", prepared / "tokenizer", folder)
    return Shards.open(folder)


def documents_of(stream, tokenizer):
    """Decode a stream, cut after each end token."""
    ids = stream[:]
    ends = np.flatnonzero(ids == tokenizer.end_id) + 1
    assert ends[-1] == len(ids)
    return [tokenizer.decode(part) for part in np.split(ids, ends[:-1])]


def test_shards_hold_every_document_in_order_with_an_end_token(prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "BATCH_BYTES", 500)
    shards = written(prepared, tmp_path / "shards")
    tokenizer = Tokenizer.load(prepared / "tokenizer")
    shards.check_tokenizer(tokenizer.digest)
    assert shards.token_bytes.tolist() == tokenizer.bytes_per_token.tolist()
    for split in SPLITS:
        stream = shards.split(split)
        documents = list(read_split(prepared / "documents", split))
        assert documents_of(stream, tokenizer) == documents
        assert stream.documents == len(documents)
        assert stream.bytes == sum(map(len, documents)) == shards.token_bytes[stream[:]].sum()
        assert stream.words == sum(len(document.split()) for document in documents)


def test_the_size_of_files_and_batches_changes_no_token(prepared, tmp_path, monkeypatch):
    whole = written(prepared, tmp_path / "whole")
    monkeypatch.setattr(encode, "BATCH_BYTES", 100)
    monkeypatch.setattr(encode, "SHARD_TOKENS", 1000)
    parts = written(prepared, tmp_path / "parts")
    sizes = [shard["tokens"] for shard in parts.splits["train"]["shards"]]
    assert len(sizes) > 2
    assert set(sizes[:-1]) == {1000}
    assert 0 < sizes[-1] <= 1000
    for split in SPLITS:
        assert parts.split(split)[:].tolist() == whole.split(split)[:].tolist()
        assert parts.splits[split]["tokens"] == len(whole.split(split))


def test_equal_inputs_give_equal_bytes(prepared, tmp_path):
    written(prepared, tmp_path / "one")
    written(prepared, tmp_path / "two")
    assert sha256(tmp_path / "one") == sha256(tmp_path / "two")


def test_ids_are_two_bytes_up_to_65536_tokens(prepared, tmp_path, monkeypatch):
    written(prepared, tmp_path / "small")
    load = Tokenizer.load

    def load_large(folder):
        tokenizer = load(folder)
        tokenizer.vocab_size = 2**16 + 1
        tokenizer.bytes_per_token = np.resize(tokenizer.bytes_per_token, 2**16 + 1)
        return tokenizer

    monkeypatch.setattr(Tokenizer, "load", load_large)
    large = written(prepared, tmp_path / "large")
    assert read_json(tmp_path / "small" / "manifest.json")["dtype"] == "uint16"
    assert read_json(tmp_path / "large" / "manifest.json")["dtype"] == "uint32"
    assert large.split("train")[:].tolist() == Shards.open(tmp_path / "small").split("train")[:].tolist()


def test_words_and_bytes_of_wikitext_2_are_the_published_ones(tmp_path):
    path = SHARED / "wikitext-2" / "wiki.test.tokens"
    if not path.exists():
        pytest.skip(f"needs {path} (set STACKLM_SHARED to the folder that holds data/wikitext-2)")
    prepare_tokenizer(tmp_path, FilesSource(paths=(str(path),), document_bytes=4096), 1000)
    shards = written(tmp_path, tmp_path / "shards")
    streams = [shards.split(split) for split in SPLITS]
    assert sum(stream.words for stream in streams) == 241_211
    assert sum(stream.bytes for stream in streams) == path.stat().st_size
