"""Stage `download`: the source's documents, without exact duplicates, split by a hash of their content.

Near-duplicates are kept in one split. They are found by MinHash signatures (Broder 1997): the similarity J of two documents is
the share of their windows of `WINDOW` bytes that both contain, in lower case and with single spaces for white space. They share
a band of their signatures, and so a group, with probability 1 - (1 - J^5)^20: 0.9996 at J = 0.8, 0.80 at 0.6, 0.0002 at 0.1.

The difficulty of valid and test is measured with a byte trigram model counted on train: it predicts each byte from the two before
it, with the shorter contexts' predictions as a prior of weight `PRIOR` (Dirichlet smoothing, MacKay and Peto 1995). A document
starts after two NUL bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from stacklm.config.data import Data
from stacklm.config.schema import plain
from stacklm.data import DataError
from stacklm.data.documents import SPLITS, read_split, written_split
from stacklm.data.formats import Account, skipped_files
from stacklm.data.sources import read_documents
from stacklm.files import read_json, write_json
from stacklm.progress import progress


def download(config: Data, inputs: Path, documents: Path) -> None:
    """Read the files listed in `inputs` and write `documents/{train,valid,test}.parquet` and `documents/record.json`.

    Empty documents and exact duplicates are left out. Near-duplicates are in one split, which depends only on their content and
    the fractions, so added text can only move its own near-duplicates to another split. Uses about 300 bytes of memory per
    document. Raises `DataError` if a split is empty, or if the source or one of its files differs from the listing.
    """
    listing = read_json(inputs)
    if listing["source"] != plain(config.source):
        raise DataError(f"{inputs.name} lists another source than data.source says; run the stage `inputs` again")
    account = Account()
    documents.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        aside = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=".all-", dir=documents)))
        digests, signatures = _gather(config, listing["files"], aside, account)
        first = groups(signatures)
        writers = {split: stack.enter_context(written_split(documents, split)) for split in SPLITS}
        for document, split in zip(read_split(aside, "all"), _splits(digests, first, config), strict=True):
            writers[split].write(document)
        counts = {split: {"documents": writer.documents, "bytes": writer.bytes} for split, writer in writers.items()}
        sizes = [size for size in Counter(first.tolist()).values() if size > 1]
        similar = {"groups": len(sizes), "documents": sum(sizes), "largest_group": max(sizes, default=0)}
        _check_none_empty(counts, config, f"{account}; {skipped_files(listing['skipped'])}", similar)
    difficulty = difficulties(documents)
    found = {"splits": counts, "difficulty": difficulty, "account": asdict(account), "near_duplicates": similar}
    write_json(documents / "record.json", {**found, **listing})
    made = ", ".join(f"{split} {count['documents']:,} documents ({count['bytes']:,} bytes)" for split, count in counts.items())
    print(f"source: {account}; {skipped_files(listing['skipped'])}")
    print(f"documents: {made}; {similar['documents']:,} near-duplicates in {similar['groups']:,} groups, each in one split")
    judged = (f"{name} {bits['bits_per_byte']:.3f} ± {bits['standard_error']:.3f}" for name, bits in difficulty.items())
    print(f"difficulty (bits per byte by counts of three bytes in train, ± standard error): {', '.join(judged)}")


def _gather(config: Data, files: list[dict], aside: Path, account: Account) -> tuple[list[bytes], np.ndarray]:
    """Write every distinct document to the split `all` in `aside`; return their digests and signatures [D, bands] in order."""
    digests: dict[bytes, None] = {}
    signatures = []
    bar = progress(total=config.source.max_bytes, desc="download", unit="B", unit_scale=True)
    with bar, written_split(aside, "all") as writer:
        for document in read_documents(config.source, files, account):
            bar.update(len(document))
            digest = hashlib.blake2b(document, digest_size=16).digest()
            if digest in digests:
                account.duplicates += 1
                account.duplicate_bytes += len(document)
            else:
                digests[digest] = None
                signatures.append(signature(document))
                writer.write(document)
    if not digests:
        todo = "raise data.source.max_bytes" if account.over_max_bytes else "give a source with text"
        raise DataError(f"no document in the source: {account}; {todo}")
    return list(digests), np.stack(signatures)


def _splits(digests: list[bytes], first: np.ndarray, config: Data) -> list[str]:
    """The split of each document: that of the lowest digest in its group, independent of the order of the documents."""
    lowest: dict[int, bytes] = {}
    for digest, group in zip(digests, first.tolist(), strict=True):
        lowest[group] = min(digest, lowest.get(group, digest))
    return [_split(lowest[group], config) for group in first.tolist()]


def _split(digest: bytes, config: Data) -> str:
    """The split of a digest: valid for the lowest hashes, test for the highest, so changing one fraction keeps the other split.

    The digest is hashed again, since as the minimum of its group it is biased towards low values.
    """
    place = int.from_bytes(hashlib.blake2b(digest, digest_size=8).digest(), "big") / 2**64
    if place < config.valid_fraction:
        return "valid"
    return "test" if place >= 1 - config.test_fraction else "train"


def _check_none_empty(counts: dict[str, dict[str, int]], config: Data, account: str, similar: dict[str, int]) -> None:
    total = sum(count["documents"] for count in counts.values())
    for split, count in counts.items():
        if not count["documents"]:
            raise DataError(
                f"split {split} has no document: the source gave {total:,}, to share as valid_fraction {config.valid_fraction}, "
                f"test_fraction {config.test_fraction} and the rest; {similar['documents']:,} are near-duplicates in "
                f"{similar['groups']:,} groups, which are not divided; give more or shorter documents (data.source.max_bytes, or "
                f"document_bytes for text files) or change the fractions. What was read: {account}"
            )


WINDOW = 16
"""Bytes per window, a power of two. A shorter document is one window."""
BANDS, ROWS = 20, 5
PIECE = 1 << 16
WINDOWS = 512
"""Maximum windows per document: those with the lowest hashes, which similar documents have in common."""
ODD = np.array([0x9E3779B97F4A7C15], dtype=np.uint64)  # an array, since numpy warns when scalars overflow
SHIFT = np.uint64(29)
KEYS = np.random.Philox(key=1).random_raw(BANDS * ROWS) | np.uint64(1)


def signature(document: bytes) -> np.ndarray:
    """Hashes of the document's bands, uint64 [BANDS]. Needs memory for about twice the document, plus 2 MiB."""
    text = b" ".join(document.lower().split()).ljust(WINDOW, b"\0")
    windows = np.empty(0, np.uint64)
    for start in range(0, len(text) - WINDOW + 1, PIECE):
        windows = np.concatenate([windows, _window_hashes(text[start : start + PIECE + WINDOW - 1])])
        if len(windows) > WINDOWS:
            windows = np.partition(windows, WINDOWS - 1)[:WINDOWS]
    lowest = (KEYS[:, None] * windows).min(axis=1).reshape(BANDS, ROWS)
    bands = np.arange(BANDS, dtype=np.uint64)
    for row in lowest.T:
        bands = _mixed(bands * ODD + row)
    return bands


def groups(signatures: np.ndarray) -> np.ndarray:
    """The index of the first document in the group of each signature [D, BANDS], int64 [D].

    Groups are connected components: a document that shares a band with any member belongs to the group.
    """
    pairs = []
    for band in signatures.T:
        order = np.argsort(band, kind="stable")
        equal = np.flatnonzero(band[order[1:]] == band[order[:-1]])
        pairs.append((order[equal], order[equal + 1]))
    edges = np.concatenate(pairs, axis=1)
    shared = coo_array((np.ones(edges.shape[1], bool), tuple(edges)), shape=(len(signatures), len(signatures)))
    labels = connected_components(shared, directed=False)[1]
    _, first, group = np.unique(labels, return_index=True, return_inverse=True)
    return first[group]


def _window_hashes(text: bytes) -> np.ndarray:
    """A hash of each window of `text`, uint64 [len - WINDOW + 1]: each round combines neighbouring windows of half the width."""
    hashes = np.frombuffer(text, np.uint8).astype(np.uint64)
    multiplier, width = ODD, 1
    while width < WINDOW:
        hashes = hashes[:-width] * multiplier + hashes[width:]
        multiplier, width = multiplier * multiplier, 2 * width
    return _mixed(hashes)


def _mixed(values: np.ndarray) -> np.ndarray:
    """Mix the bits of each value, so that a difference in a few bits affects all of them (modulo 2^64)."""
    values = (values ^ (values >> SHIFT)) * ODD
    return values ^ (values >> SHIFT)


PRIOR = 16.0
TRAIN_BYTES = 32_000_000
"""Maximum bytes of train to count."""


def difficulties(documents: Path) -> dict[str, dict[str, float]]:
    """Bits per byte of valid and test, and the difference test - valid, each with its standard error over documents.

    Takes about 130 MB of memory and 0.1 s of CPU time per MB of text.
    """
    counts = [np.zeros(256**order, np.uint32) for order in (1, 2, 3)]
    counted = 0
    for text in read_split(documents, "train"):
        counted += len(text)
        if counted > TRAIN_BYTES:
            break
        for count, codes in zip(counts, _codes(text), strict=True):
            np.add.at(count, codes, np.uint32(1))
    contexts = [count.reshape(-1, 256).sum(axis=1) for count in counts]
    judged = {split: _bits_per_byte(read_split(documents, split), counts, contexts) for split in ("valid", "test")}
    (valid, valid_error), (test, test_error) = judged.values()
    judged["test - valid"] = (test - valid, float(np.hypot(valid_error, test_error)))
    return {name: {"bits_per_byte": round(mean, 4), "standard_error": round(error, 4)} for name, (mean, error) in judged.items()}


def _codes(text: bytes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The 1-, 2- and 3-grams that end at each byte of the text, as numbers in base 256, int64 [len] each."""
    codes = np.frombuffer(b"\0\0" + text, np.uint8).astype(np.int64)
    return codes[2:], codes[1:-1] * 256 + codes[2:], (codes[:-2] * 256 + codes[1:-1]) * 256 + codes[2:]


def _bits_per_byte(texts: Iterable[bytes], counts: list[np.ndarray], contexts: list[np.ndarray]) -> tuple[float, float]:
    """Total bits over total bytes, and its standard error over documents (0 for a single one)."""
    sizes, bits = [], []
    for text in texts:
        probability = np.full(len(text), 1 / 256)
        for count, context, codes in zip(counts, contexts, _codes(text), strict=True):
            probability = (count[codes] + PRIOR * probability) / (context[codes // 256] + PRIOR)
        sizes.append(len(text))
        bits.append(-np.log2(probability).sum())
    ratio = sum(bits) / sum(sizes)
    residuals = np.array(bits) - ratio * np.array(sizes)
    units = len(sizes)
    return float(ratio), float(np.sqrt((residuals**2).sum() * units / max(1, units - 1)) / sum(sizes))
