"""Stage `shards`: every document becomes token ids in the files that `stacklm.data.shards` reads."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from stacklm.data.documents import SPLITS, read_split
from stacklm.data.shards import DTYPES, VERSION
from stacklm.data.tokenizer import Tokenizer
from stacklm.files import read_json, write_json, written_aside

SHARD_TOKENS = 2**28
BATCH_BYTES = 1 << 20


def write_shards(documents: Path, tokenizer: Path, shards: Path) -> None:
    """Encode every split and write `shards/manifest.json` and `shards/{split}-{number}.bin`.

    Ids are uint16 where the vocabulary allows, else uint32. Memory grows with the longest document (about 120 bytes for
    each of its bytes), not with the text.
    """
    encoder = Tokenizer.load(tokenizer)
    dtype = "uint16" if encoder.vocab_size <= 2**16 else "uint32"
    size = sum(split["bytes"] for split in read_json(documents / "record.json")["splits"].values())
    splits = {}
    with tqdm(total=size, desc="shards", unit="B", unit_scale=True, mininterval=0.5) as bar:
        for split in SPLITS:
            counts = {"tokens": 0, "documents": 0, "bytes": 0, "words": 0}
            stream = _encoded(encoder, read_split(documents, split), counts, bar)
            files = _write_files(shards, split, DTYPES[dtype], stream)
            splits[split] = {**counts, "shards": files}
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


def _encoded(encoder: Tokenizer, documents: Iterator[bytes], counts: dict[str, int], bar: tqdm) -> Iterator[np.ndarray]:
    """Yield the ids of a few documents at a time, each document followed by the end token, adding up `counts`."""
    end = [encoder.end_id]
    for batch in _batches(documents):
        ids = np.concatenate([np.array(ids + end, dtype=np.int64) for ids in encoder.encode_batch(batch)])
        size = sum(map(len, batch))
        counts["tokens"] += len(ids)
        counts["documents"] += len(batch)
        counts["bytes"] += size
        counts["words"] += sum(len(document.split()) for document in batch)
        bar.update(size)
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
    """Write the ids into files of `SHARD_TOKENS` each, the last one shorter, and return what the manifest says of them."""
    shards: list[dict] = []
    ids = next(stream)
    while len(ids):
        name = f"{split}-{len(shards):05d}.bin"
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
