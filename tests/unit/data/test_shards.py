"""Reading token shards."""

import hashlib
import json
import random
import shutil

import numpy as np
import pytest

from stacklm.data import DataError
from stacklm.data.shards import TARGETS, Shards, TokenStream
from stacklm.files import read_json, sha256, write_json

VOCAB = 300


def write_folder(folder, dtype="uint16"):
    """Shards by hand: a train split of several files, and a valid split of one. Returns the ids of train."""
    rng = np.random.default_rng(1)
    folder.mkdir()
    splits = {}
    streams = {}
    for split, sizes in {"train": (50, 1, 30), "valid": (7,)}.items():
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


@pytest.fixture
def folder(tmp_path):
    write_folder(tmp_path / "shards")
    return tmp_path / "shards"


def edit(folder, path, value):
    """Replace one value of the manifest, or take it out where the value is `...`."""
    manifest = read_json(folder / "manifest.json")
    place = manifest
    for key in path[:-1]:
        place = place[key]
    if value is ...:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    write_json(folder / "manifest.json", manifest)


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


def test_a_folder_may_say_which_tokens_are_targets_of_the_loss(folder):
    assert Shards.open(folder).split("train").targets is None
    masks = {"train": np.arange(81) % 2 == 0, "valid": np.ones(7, bool)}
    path = folder / TARGETS
    np.savez(path, **masks)
    edit(folder, ["targets"], sha256(path))
    for split, mask in masks.items():
        assert np.array_equal(Shards.open(folder).split(split).targets, mask)
    np.savez(path, train=masks["train"], valid=~masks["valid"])
    with pytest.raises(DataError, match=r"targets\.npz: .*not what was written"):
        Shards.open(folder).split("train")
    path.unlink()
    with pytest.raises(DataError, match=r"targets\.npz: missing"):
        Shards.open(folder).split("train")


def test_a_stream_is_not_read_backwards(folder):
    with pytest.raises(ValueError, match="not in steps of -1"):
        Shards.open(folder).split("train")[::-1]


def test_windows_may_be_changed_without_touching_the_file(folder):
    stream = Shards.open(folder).split("train")
    before = stream[0:10].tolist()
    stream[0:10][:] = 0
    assert stream[0:10].tolist() == before


def test_facts_of_the_folder(folder):
    shards = Shards.open(folder)
    assert (shards.vocab_size, shards.end_id, shards.tokenizer) == (300, 0, "abc")
    assert shards.token_bytes.sum() == 299
    stream = shards.split("valid")
    assert (len(stream), stream.end_id, stream.documents, stream.bytes, stream.words) == (7, 0, 3, 200, 40)


def test_an_unknown_split_names_the_known_ones(folder):
    with pytest.raises(DataError, match="no split 'validation'; the splits are train, valid"):
        Shards.open(folder).split("validation")


@pytest.mark.parametrize("damage", ["truncated", "longer", "gone"])
def test_a_file_of_another_size_is_named_at_once(folder, damage):
    path = folder / "train-00002.bin"
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes((path.read_bytes() * 2)[: 58 if damage == "truncated" else 62])
    with pytest.raises(DataError, match=r"train-00002\.bin: (58|62|no) bytes, but 60 were written; run the stage `shards` again"):
        Shards.open(folder)


def test_a_flipped_bit_is_found_in_its_split_with_both_hashes(folder):
    path = folder / "train-00000.bin"
    written = hashlib.sha256(path.read_bytes()).hexdigest()
    data = bytearray(path.read_bytes())
    data[40] ^= 1
    path.write_bytes(data)
    shards = Shards.open(folder)
    assert len(shards.split("valid")) == 7
    with pytest.raises(DataError, match=rf"train-00000\.bin: its SHA-256 is {hashlib.sha256(data).hexdigest()}, but {written} was"):
        shards.split("train")


def test_an_id_outside_the_vocabulary_is_an_error(folder):
    small = int(Shards.open(folder).split("train")[:].max())
    edit(folder, ["vocab_size"], small)
    edit(folder, ["token_bytes"], [1] * small)
    with pytest.raises(DataError, match=f"token id {small} is outside the vocabulary of {small}"):
        Shards.open(folder).split("train")


def test_another_version_and_a_torn_table_are_errors(folder):
    edit(folder, ["token_bytes"], [1, 2])
    with pytest.raises(DataError, match="token_bytes for 2 tokens, but a vocabulary of 300"):
        Shards.open(folder)
    edit(folder, ["version"], 2)
    with pytest.raises(DataError, match="version 2, not 1"):
        Shards.open(folder)
    with pytest.raises(DataError, match=r"no manifest\.json"):
        Shards.open(folder.parent)


SHARD = ("splits", "train", "shards", 0)


def places(value, path=()):
    """Every mapping's key and every list's first item in a JSON value."""
    items = value.items() if isinstance(value, dict) else list(enumerate(value))[:1] if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from places(item, (*path, key))


def test_every_key_of_a_manifest_is_needed_and_has_a_type(folder):
    path = folder / "manifest.json"
    whole = path.read_bytes()
    found = 0
    for place in places(json.loads(whole)):
        for value in (..., None, True, -1, 1.5, "x", [], {}, [[]], 2**70):
            path.write_bytes(whole)
            edit(folder, place, value)
            if value == "x" and place[-1] in ("tokenizer", "sha256"):
                continue  # a text, to be compared with others
            if value is ... and place in (("splits", "train"), ("splits", "valid")):
                continue  # a split that is not there is missed when it is asked for
            if value == {} and place == ("splits",):
                continue
            with pytest.raises(DataError, match=r"manifest\.json: .*run the stage `shards` again"):
                Shards.open(folder)
            found += 1
    assert found > 150


@pytest.mark.parametrize(
    "name", ["../outside.bin", "/etc/passwd", "..", "", "sub/train-00000.bin", "train-00001.bin", "C:x", "a\\b"]
)
def test_a_manifest_points_to_no_other_file(folder, name):
    shutil.copy(folder / "train-00000.bin", folder.parent / "outside.bin")
    edit(folder, (*SHARD, "file"), name)
    with pytest.raises(DataError, match=r"manifest\.json: splits\.train\.shards\[0\]\.file: .* must be 'train-00000\.bin'"):
        Shards.open(folder)


def test_a_manifest_does_not_contradict_itself(folder):
    whole = (folder / "manifest.json").read_bytes()
    for path, value, message in (
        (("end_id",), 300, "end_id: 300 is outside the vocabulary of 300"),
        (("splits", "train", "tokens"), 82, r"splits\.train\.tokens: 82, but its shards have 81"),
        ((*SHARD, "tokens"), 51, r"splits\.train\.tokens: 81, but its shards have 82"),
        (("splits", "../x"), {**json.loads(whole)["splits"]["valid"]}, r"splits: '\.\./x' is not the name"),
        (("extra",), 1, "extra: unknown key"),
    ):
        (folder / "manifest.json").write_bytes(whole)
        edit(folder, path, value)
        with pytest.raises(DataError, match=rf"manifest\.json: {message}"):
            Shards.open(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"null", b"[]", b"3", b"\xff\xfe", b"[" * 100_000, b"9" * 5_000, "truncated"])
def test_a_damaged_manifest_is_an_error_with_its_name(folder, content):
    path = folder / "manifest.json"
    path.write_bytes(path.read_bytes()[:-200] if content == "truncated" else content)
    with pytest.raises(DataError, match=r"manifest\.json: .*run the stage `shards` again"):
        Shards.open(folder)


def test_another_tokenizer_is_an_error(folder):
    shards = Shards.open(folder)
    shards.check_tokenizer("abc")
    with pytest.raises(DataError, match="made with tokenizer abc, not def"):
        shards.check_tokenizer("def")


def test_a_stream_holds_no_more_than_a_map_of_its_files(folder):
    """A folder can be moved, and a stream is read from the disk when asked."""
    ids = Shards.open(folder).split("train")[:]
    shutil.move(folder, folder.parent / "moved")
    stream = Shards.open(folder.parent / "moved").split("train")
    assert all(isinstance(file.base, np.memmap) for file in stream._files)
    assert stream[3:60].tolist() == ids[3:60].tolist()


def test_a_stream_of_one_array():
    stream = TokenStream([np.arange(5, dtype=np.uint16)], end_id=0, documents=1, bytes=4, words=1)
    assert stream[2:4].tolist() == [2, 3]
    assert stream[4:2].tolist() == stream[9:12].tolist() == []
