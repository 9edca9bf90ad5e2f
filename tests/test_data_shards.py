"""Token shards, read back."""

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from stacklm.data import DataError
from stacklm.data.shards import Shards, TokenStream
from stacklm.files import read_json, write_json

VOCAB = 300


def write_folder(folder, dtype="uint16", lengths=(50, 1, 30)):
    """Shards by hand: a train split of several files, and a valid split of one. Returns the ids of train."""
    rng = np.random.default_rng(1)
    folder.mkdir()
    splits = {}
    streams = {}
    for split, sizes in {"train": lengths, "valid": (7,)}.items():
        parts = [rng.integers(0, VOCAB, size) for size in sizes]
        entries = []
        for i, part in enumerate(parts):
            data = part.astype({"uint16": "<u2", "uint32": "<u4"}[dtype]).tobytes()
            (folder / f"{split}-{i:05d}.bin").write_bytes(data)
            entries.append({"file": f"{split}-{i:05d}.bin", "tokens": len(part), "sha256": hashlib.sha256(data).hexdigest()})
        streams[split] = np.concatenate(parts)
        splits[split] = {"tokens": sum(sizes), "documents": 3, "bytes": 200, "words": 40, "shards": entries}
    manifest = {"version": 1, "dtype": dtype, "vocab_size": VOCAB, "end_id": 0, "tokenizer": "abc", "token_bytes": [0] + [1] * 299}
    write_json(folder / "manifest.json", {**manifest, "splits": splits})
    return streams["train"]


def change(folder, **values):
    write_json(folder / "manifest.json", {**read_json(folder / "manifest.json"), **values})


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_a_stream_is_its_files_in_a_row(tmp_path, dtype):
    ids = write_folder(tmp_path / "shards", dtype)
    stream = Shards.open(tmp_path / "shards").split("train")
    assert len(stream) == 81
    rng = random.Random(1)
    for _ in range(300):
        a, b = rng.randrange(-90, 91), rng.randrange(-90, 91)
        window = stream[a:b]
        assert window.dtype == np.int64
        assert window.tolist() == ids[a:b].tolist()
    assert stream[:].tolist() == ids.tolist()


def test_a_stream_is_not_read_backwards(tmp_path):
    write_folder(tmp_path / "shards")
    with pytest.raises(ValueError, match="not in steps of -1"):
        Shards.open(tmp_path / "shards").split("train")[::-1]


def test_windows_may_be_changed_without_touching_the_file(tmp_path):
    ids = write_folder(tmp_path / "shards")
    stream = Shards.open(tmp_path / "shards").split("train")
    stream[0:10][:] = 0
    assert stream[0:10].tolist() == ids[:10].tolist()


def test_facts_of_the_folder(tmp_path):
    write_folder(tmp_path / "shards")
    shards = Shards.open(tmp_path / "shards")
    assert (shards.vocab_size, shards.end_id, shards.tokenizer) == (300, 0, "abc")
    assert shards.token_bytes.sum() == 299
    stream = shards.split("valid")
    assert (len(stream), stream.end_id, stream.documents, stream.bytes, stream.words) == (7, 0, 3, 200, 40)


def test_an_unknown_split_names_the_known_ones(tmp_path):
    write_folder(tmp_path / "shards")
    with pytest.raises(DataError, match="no split 'validation'; the splits are train, valid"):
        Shards.open(tmp_path / "shards").split("validation")


@pytest.mark.parametrize("damage", ["truncated", "longer", "gone"])
def test_a_file_of_another_size_is_named_at_once(tmp_path, damage):
    write_folder(tmp_path / "shards")
    path = tmp_path / "shards" / "train-00002.bin"
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes((path.read_bytes() * 2)[: 58 if damage == "truncated" else 62])
    with pytest.raises(DataError, match=r"train-00002\.bin: (58|62|no) bytes, but 60 were written; run the stage `shards` again"):
        Shards.open(tmp_path / "shards")


def test_a_flipped_bit_is_found_in_its_split_with_both_hashes(tmp_path):
    write_folder(tmp_path / "shards")
    path = tmp_path / "shards" / "train-00000.bin"
    written = hashlib.sha256(path.read_bytes()).hexdigest()
    data = bytearray(path.read_bytes())
    data[40] ^= 1
    path.write_bytes(data)
    shards = Shards.open(tmp_path / "shards")
    assert len(shards.split("valid")) == 7
    with pytest.raises(DataError, match=rf"train-00000\.bin: its SHA-256 is {hashlib.sha256(data).hexdigest()}, but {written} was"):
        shards.split("train")


def test_an_id_outside_the_vocabulary_is_an_error(tmp_path):
    ids = write_folder(tmp_path / "shards")
    small = int(ids.max())
    change(tmp_path / "shards", vocab_size=small, token_bytes=[1] * small)
    with pytest.raises(DataError, match=f"token id {small} is outside the vocabulary of {small}"):
        Shards.open(tmp_path / "shards").split("train")


def test_another_version_and_a_torn_table_are_errors(tmp_path):
    write_folder(tmp_path / "shards")
    change(tmp_path / "shards", token_bytes=[1, 2])
    with pytest.raises(DataError, match="token_bytes for 2 tokens, but a vocabulary of 300"):
        Shards.open(tmp_path / "shards")
    change(tmp_path / "shards", version=2)
    with pytest.raises(DataError, match="version 2, not 1"):
        Shards.open(tmp_path / "shards")
    with pytest.raises(DataError, match=r"no manifest\.json"):
        Shards.open(tmp_path)


def test_another_tokenizer_is_an_error(tmp_path):
    write_folder(tmp_path / "shards")
    shards = Shards.open(tmp_path / "shards")
    shards.check_tokenizer("abc")
    with pytest.raises(DataError, match="made with tokenizer abc, not def"):
        shards.check_tokenizer("def")


def test_a_stream_holds_no_more_than_a_map_of_its_files(tmp_path):
    """A folder can be moved, and a stream is read from the disk when asked."""
    ids = write_folder(tmp_path / "shards")
    shutil.move(tmp_path / "shards", tmp_path / "moved")
    stream = Shards.open(tmp_path / "moved").split("train")
    assert all(isinstance(file.base, np.memmap) for file in stream._files)
    assert stream[3:60].tolist() == ids[3:60].tolist()


def test_reading_and_batching_need_neither_tokenizers_nor_pyarrow():
    program = (
        "import sys, json; import stacklm.data.shards, stacklm.data.batches;"
        "print(json.dumps([m for m in ('tokenizers', 'pyarrow', 'datasets', 'dvc', 'mlflow', 'prefect') if m in sys.modules]))"
    )
    out = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parent.parent,
    ).stdout
    assert json.loads(out) == []


def test_a_stream_of_one_array():
    stream = TokenStream([np.arange(5, dtype=np.uint16)], end_id=0, documents=1, bytes=4, words=1)
    assert stream[2:4].tolist() == [2, 3]
    assert stream[4:2].tolist() == stream[9:12].tolist() == []
