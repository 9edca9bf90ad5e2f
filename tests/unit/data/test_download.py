"""Splits of the documents."""

import hashlib
import json
import math
import random
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from stacklm.config.data import Data, FilesSource, StdlibSource
from stacklm.data import DataError
from stacklm.data.documents import SPLITS, read_split
from stacklm.data.download import BANDS, difficulties, download, groups, signature
from stacklm.files import read_json, sha256
from support.corpus import download_documents, write_documents, write_texts

pytestmark = pytest.mark.usefixtures("project")
TEXTS = [f"document {i}" for i in range(400)]


def downloaded(source, name="documents", valid=0.2, test=0.2):
    """The record of what a source holds, and the documents of each split."""
    folder = download_documents(Path(), Data(source, valid, test), name)
    return read_json(folder / "record.json"), {split: list(read_split(folder, split)) for split in SPLITS}


def split_texts(texts, name="documents", valid=0.2, test=0.1):
    """The texts of each split."""
    write_texts(Path("a.jsonl"), texts)
    _, splits = downloaded(FilesSource(paths=("a.jsonl",)), name, valid, test)
    return {split: [document.decode() for document in documents] for split, documents in splits.items()}


def test_every_document_is_in_exactly_one_split_of_about_the_share_asked_for():
    splits = split_texts(TEXTS)
    assert sorted(chain(*splits.values())) == sorted(TEXTS)
    assert 0.12 < len(splits["valid"]) / len(TEXTS) < 0.28
    assert 0.05 < len(splits["test"]) / len(TEXTS) < 0.15


def test_a_documents_place_depends_on_its_content_alone():
    before = split_texts(TEXTS)
    shuffled = TEXTS + [f"new {i}" for i in range(100)]
    random.Random(1).shuffle(shuffled)
    after = split_texts(shuffled, "other")
    for split in SPLITS:
        assert set(before[split]) == set(after[split]) & set(TEXTS)


def test_changing_one_fraction_leaves_the_other_split_alone():
    before = split_texts(TEXTS)
    more_valid = split_texts(TEXTS, "valid", valid=0.4)
    more_test = split_texts(TEXTS, "test", test=0.3)
    assert more_valid["test"] == before["test"]
    assert set(more_valid["valid"]) > set(before["valid"])
    assert more_test["valid"] == before["valid"]
    assert set(more_test["test"]) > set(before["test"])


def test_duplicates_and_empty_documents_are_dropped_and_counted():
    splits = split_texts([*TEXTS, "", *TEXTS[:30], "", TEXTS[0]])
    assert sorted(chain(*splits.values())) == sorted(TEXTS)
    record = read_json(Path("documents/record.json"))
    account = record["account"]
    again = [*TEXTS[:30], TEXTS[0]]
    assert (account["duplicates"], account["duplicate_bytes"], account["empty"]) == (31, sum(map(len, again)), 2)


def test_the_record_holds_counts_inputs_and_source():
    splits = split_texts(TEXTS)
    record = read_json(Path("documents/record.json"))
    counts = {s: {"documents": len(texts), "bytes": sum(map(len, texts))} for s, texts in splits.items()}
    assert record["splits"] == counts
    assert record["files"] == [{"name": "a.jsonl", "bytes": Path("a.jsonl").stat().st_size, "sha256": sha256(Path("a.jsonl"))}]
    assert record["source"]["paths"] == ["a.jsonl"]


def test_equal_inputs_give_equal_bytes():
    split_texts(TEXTS, "one")
    split_texts(TEXTS, "two")
    assert sha256(Path("one")) == sha256(Path("two"))


def test_a_split_without_documents_is_an_error_and_leaves_nothing():
    with pytest.raises(DataError, match=r"split valid has no document: the source gave 3, .* change the fractions"):
        split_texts(TEXTS[:3], valid=0.001)
    assert not Path("documents/record.json").exists()
    assert not any(Path("documents").glob("*.parquet"))


def test_a_list_of_another_source_is_refused():
    split_texts(TEXTS)
    with pytest.raises(DataError, match=r"inputs\.json lists another source than data\.source says"):
        download(Data(FilesSource(paths=("a.jsonl",), document_bytes=1)), Path("inputs.json"), Path("other"))


def some_texts(count, seed, words=60):
    rng = random.Random(seed)
    return [" ".join(f"w{rng.randrange(3_000)}" for _ in range(words)) for _ in range(count)]


def test_near_duplicates_are_in_one_split_whatever_their_order():
    rng = random.Random(2)
    texts = []
    for text in some_texts(100, 1):
        words = text.split()
        words[rng.randrange(len(words))] = "changed"
        texts += [text, " ".join(words), f"{text} and a few words more", text.upper()]
    rng.shuffle(texts)
    splits = split_texts(texts)
    assert sorted(chain(*splits.values())) == sorted(texts)
    place = {text: split for split, found in splits.items() for text in found}
    for text in some_texts(100, 1):
        shared = text.lower().split()
        versions = [other for other in texts if len(set(shared) & set(other.lower().split())) > 40]
        assert len(versions) == 4 and len({place[version] for version in versions}) == 1
    assert 0.08 < len(splits["valid"]) / len(texts) < 0.32  # a group's place is as likely in each split as a document's
    assert 0.02 < len(splits["test"]) / len(texts) < 0.2
    record = read_json(Path("documents/record.json"))
    assert record["near_duplicates"] == {"groups": 100, "documents": 400, "largest_group": 4}


def test_no_document_of_valid_or_test_is_in_train_or_nearly():
    """By exact hash, and by the windows of 16 bytes that two documents share."""
    _, splits = downloaded(StdlibSource(max_bytes=700_000))
    digests = {split: {hashlib.sha256(text).digest() for text in texts} for split, texts in splits.items()}
    assert all(len(digests[split]) == len(texts) > 30 for split, texts in splits.items())
    assert not digests["valid"] & digests["train"] and not digests["test"] & (digests["train"] | digests["valid"])

    def windows(text):
        text = b" ".join(text.lower().split())
        return {text[i : i + 16] for i in range(max(1, len(text) - 15))}

    trained = [windows(text) for text in splits["train"]]
    for text in splits["valid"][:8] + splits["test"][:8]:
        judged = windows(text)
        assert max(len(judged & other) / len(judged | other) for other in trained) < 0.85


def test_the_account_adds_up_and_says_what_was_lost():
    texts = some_texts(100, 3)
    rows = [*texts, None, None, "", texts[0], texts[1], "\ufeff" + texts[2]]
    Path("a.jsonl").write_text("\n\n".join(json.dumps({"text": text}) for text in rows))
    Path("b.txt").write_bytes("\n\n".join(some_texts(50, 4)).encode() + b" caf\xe9")
    Path("c.txt").touch()
    Path("d.txt").symlink_to("nowhere")
    record, splits = downloaded(FilesSource(paths=("a.jsonl", "*.txt"), document_bytes=500))
    account, kept = record["account"], [*chain(*splits.values())]
    assert record["skipped"] == {"c.txt": "zero bytes", "d.txt": "dangling link"}
    assert (account["files"], account["rows"], account["blank_lines"], account["null_texts"]) == (2, 106, 105, 2)
    assert (account["duplicates"], account["empty"], account["byte_order_marks"], account["not_utf8"]) == (3, 1, 1, 1)
    assert account["documents"] == len(kept) + account["duplicates"] + account["empty"]
    assert account["bytes"] == sum(map(len, kept)) + account["duplicate_bytes"]
    of_b = [document for document in kept if document.decode("latin-1") not in texts]
    assert account["documents"] == account["rows"] - account["null_texts"] + len(of_b)


def test_what_max_bytes_leaves_unread_is_counted(capsys):
    for name in "abcd":
        write_texts(Path(f"{name}.jsonl"), some_texts(40, name))
    record, _ = downloaded(FilesSource(paths=("*.jsonl",), max_bytes=20_000))
    account = record["account"]
    assert (account["files"], account["files_not_read"], account["over_max_bytes"]) == (2, 2, 1)
    assert "1 over max bytes" in capsys.readouterr().out


NONE = "no document in the source"


@pytest.mark.parametrize(
    ("rows", "most", "message"),
    [
        ([None] * 12, None, f"{NONE}: 1 files, 12 rows, 0 documents, 0 bytes read; 12 null texts; give a source with"),
        (["", None], None, f"{NONE}: 1 files, 2 rows, 1 documents, 0 bytes read; 1 null texts; 1 empty"),
        (["long text"], 5, r"1 over max bytes; raise data\.source\.max_bytes"),
        ([f"the same long text and one number, which is {i}" for i in range(90)], None, "90 are near-duplicates in 1 groups"),
    ],
)
def test_a_source_without_text_for_all_splits_is_an_error_with_the_account(rows, most, message):
    write_texts(Path("a.jsonl"), rows)
    with pytest.raises(DataError, match=message):
        downloaded(FilesSource(paths=("a.jsonl",), max_bytes=most))
    assert list(Path("documents").iterdir()) == []


def test_the_default_corpus_has_some_hundred_documents_to_judge_by_as_hard_in_valid_as_in_test(capsys):
    record = read_json(download_documents(Path(), Data(StdlibSource())) / "record.json")
    for split in ("valid", "test"):
        assert record["splits"][split]["documents"] > 120
        assert record["splits"][split]["bytes"] > 200_000
    difference = record["difficulty"]["test - valid"]
    assert abs(difference["bits_per_byte"]) < 4 * difference["standard_error"] < 0.25
    assert "generated table" in record["skipped"].values()
    assert record["near_duplicates"]["largest_group"] < 20
    assert "difficulty (bits per byte" in capsys.readouterr().out


def some_words(rng, count):
    return [b"w%d" % rng.randrange(10**6) for _ in range(count)]


@pytest.mark.parametrize("words", [12, 100, 2_000])
def test_likely_similarity_decides(words):
    """Of the windows of 16 bytes two documents share J; few with J of 0.8 or more are missed, few below 0.2 are joined."""
    rng = random.Random(words)
    joined = {0.02: 0, 0.9: 0}
    for _ in range(20):
        for share in joined:
            text = some_words(rng, words)
            other = list(text)
            for i in rng.sample(range(words), round((1 - share) * words / 4) if share > 0.5 else words - words // 20):
                other[i] = some_words(rng, 1)[0]
            joined[share] += bool((signature(b" ".join(text)) == signature(b" ".join(other))).any())
    assert joined[0.9] >= 19
    assert joined[0.02] == 0


def test_case_and_white_space_do_not_matter():
    text = b" ".join(some_words(random.Random(1), 200))
    assert (signature(text) == signature(text.upper().replace(b" ", b"\r\n\t "))).all()


def test_a_document_in_pieces_has_the_signature_of_the_whole(monkeypatch):
    text = random.Random(1).randbytes(30_000)
    whole = signature(text)
    for piece in (513, 1_000, 4_096):
        monkeypatch.setattr("stacklm.data.download.PIECE", piece)
        assert (signature(text) == whole).all()


def test_short_documents_are_alike_if_equal():
    texts = [b"", b"a", b"b", b"document 1", b"document 2", b"A", b"fifteen bytes..", b"sixteen bytes..."]
    assert groups(np.stack([signature(text) for text in texts])).tolist() == [0, 1, 2, 3, 4, 1, 6, 7]


def test_groups_are_closed_and_named_by_their_first_member():
    """Chains of shared bands against a plain search through the graph."""
    rng = np.random.default_rng(1)
    signatures = rng.integers(0, 150, (300, BANDS)).astype(np.uint64) * np.uint64(1000)
    signatures[:, 1:] += np.arange(300, dtype=np.uint64)[:, None]  # only the first band is shared
    signatures[:, 1] //= np.uint64(2000)
    wanted = np.arange(300)
    changed = True
    while changed:
        changed = False
        for i in range(300):
            near = (signatures == signatures[i]).any(axis=1)
            lowest = wanted[near].min()
            changed |= bool((wanted[near] != lowest).any())
            wanted[near] = lowest
    assert groups(signatures).tolist() == wanted.tolist()
    assert len({*wanted.tolist()}) < 150


def drawn(rng, alphabet, count, size=800):
    return [bytes(rng.choice(alphabet) for _ in range(size)) for _ in range(count)]


def test_random_bytes_of_an_alphabet_take_its_entropy(tmp_path):
    """With 4 letters 2 bits; the first byte of each document and the prior add a little."""
    rng = random.Random(1)
    texts = {"train": drawn(rng, b"abcd", 200), "valid": drawn(rng, b"abcd", 30), "test": drawn(rng, b"ab", 30)}
    found = difficulties(write_documents(tmp_path, texts))
    assert found["valid"]["bits_per_byte"] == pytest.approx(2, abs=0.03)
    assert found["test"]["bits_per_byte"] == pytest.approx(2, abs=0.03)


def test_a_hand_counted_case(tmp_path):
    """train `ab`, valid `a`: with prior 16 the shares of `a` are mixed over contexts of none, one and two NUL bytes."""
    found = difficulties(write_documents(tmp_path, {"train": [b"ab"], "valid": [b"a"], "test": [b"c"]}))
    none = (1 + 16 / 256) / (2 + 16)
    one = (1 + 16 * none) / (1 + 16)
    two = (1 + 16 * one) / (1 + 16)
    assert found["valid"]["bits_per_byte"] == pytest.approx(-math.log2(two), abs=1e-4)
    unseen = (16 / 256) / 18 * (16 / 17) ** 2
    assert found["test"]["bits_per_byte"] == pytest.approx(-math.log2(unseen), abs=1e-4)


def test_the_standard_error_is_the_spread_of_repeated_draws(tmp_path):
    rng = random.Random(2)
    train = drawn(rng, b"aab", 100, 300) + drawn(rng, bytes(range(97, 123)), 100, 300)
    ratios = []
    for _ in range(24):
        some = [drawn(rng, rng.choice([b"aab", bytes(range(97, 123))]), 1, rng.randrange(50, 400))[0] for _ in range(80)]
        documents = write_documents(tmp_path, {"train": train, "valid": some[:40], "test": some[40:]})
        found = difficulties(documents)["test - valid"]
        ratios.append(found["bits_per_byte"] / found["standard_error"])
    spread = math.sqrt(sum(ratio**2 for ratio in ratios) / len(ratios))
    assert 0.5 < spread < 1.5  # 24 draws know a standard deviation to 1 / sqrt(48) = 14%: 3 of these, and 5% for 40 documents
