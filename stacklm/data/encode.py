"""Stage `shards`: encode every document as token ids, in the files that `stacklm.data.shards` reads."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from stacklm.data.documents import SPLITS, TextRecord, read_split
from stacklm.data.shards import DTYPES, VERSION, file_name
from stacklm.data.tokenizer import Tokenizer, check_trained_on
from stacklm.files import read_json, write_json, written_aside
from stacklm.progress import progress

SHARD_TOKENS = 2**28
BATCH_BYTES = 1 << 20


def write_shards(documents: Path, tokenizer: Path, shards: Path) -> None:
    """Encode every split and write `shards/manifest.json` and `shards/{split}-{number}.bin`.

    Ids are uint16 if the vocabulary allows, else uint32. Memory grows with the longest document (about 120 bytes for
    each of its bytes), not with the text. Raises `DataError` for a tokenizer that was not trained on this train split.
    """
    encoder = Tokenizer.load(tokenizer)
    dtype = "uint16" if encoder.vocab_size <= 2**16 else "uint32"
    size = sum(split["bytes"] for split in read_json(documents / "record.json")["splits"].values())
    splits = {}
    with progress(total=size, desc="shards", unit="B", unit_scale=True) as bar:
        for split in SPLITS:
            counts = {"tokens": 0, "words": 0}
            text = TextRecord()
            stream = _encoded(encoder, read_split(documents, split), counts, text, bar)
            files = _write_files(shards, split, DTYPES[dtype], stream)
            if split == "train":
                check_trained_on(tokenizer, text)
            splits[split] = {**counts, "documents": text.documents, "bytes": text.bytes, "shards": files}
    manifest = {
        "version": VERSION,
        "dtype": dtype,
        "vocab_size": encoder.vocab_size,
        "end_id": encoder.end_id,
        "tokenizer": encoder.digest,
        "token_bytes": encoder.bytes_per_token.tolist(),
        "splits": splits,
    }
    write_json(shards / "manifest.json", manifest)
    made = ", ".join(f"{name} {split['tokens']:,} tokens" for name, split in splits.items())
    print(f"shards: {made}, {dtype}")


def _encoded(
    encoder: Tokenizer, documents: Iterator[bytes], counts: dict[str, int], text: TextRecord, bar: tqdm
) -> Iterator[np.ndarray]:
    """Yield the ids of a few documents at a time, each followed by the end token, and update `counts` and `text`."""
    end = [encoder.end_id]
    for batch in _batches(documents):
        ids = np.concatenate([np.array(ids + end, dtype=np.int64) for ids in encoder.encode_batch(batch)])
        counts["tokens"] += len(ids)
        for document in batch:
            counts["words"] += len(document.split())
            text.add(document)
            bar.update(len(document))
        yield ids


def _batches(documents: Iterator[bytes]) -> Iterator[list[bytes]]:
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _write_files(folder: Path, split: str, dtype: np.dtype, stream: Iterator[np.ndarray]) -> list[dict]:
    """Write the ids to files of `SHARD_TOKENS` each, the last one shorter; return their entries in the manifest."""
    shards: list[dict] = []
    ids = next(stream)
    while len(ids):
        name = file_name(split, len(shards))
        digest, tokens = hashlib.sha256(), 0
        with written_aside(folder / name) as aside, aside.open("wb") as file:
            while len(ids) and tokens < SHARD_TOKENS:
                part, ids = np.split(ids, [SHARD_TOKENS - tokens])
                data = part.astype(dtype).tobytes()
                file.write(data)
                digest.update(data)
                tokens += len(part)
                if not len(ids):
                    ids = next(stream, ids)
        shards.append({"file": name, "tokens": tokens, "sha256": digest.hexdigest()})
    return shards
