"""Stage `download`: the source's documents, without exact duplicates, split by a hash of their content."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path

from tqdm import tqdm

from stacklm.config.data import Data
from stacklm.config.schema import plain
from stacklm.data import DataError
from stacklm.data.documents import SPLITS, written_split
from stacklm.data.sources import read_documents
from stacklm.files import read_json, write_json


def download(config: Data, inputs: Path, documents: Path) -> None:
    """Read the files listed in `inputs` and write `documents/{train,valid,test}.parquet` and `documents/record.json`.

    A document's split depends on its content and the fractions alone, so adding text moves nothing. Empty documents
    and exact duplicates are left out; 16 bytes are kept in memory for each document. Raises `DataError` if a split
    stays empty, or if the source or one of its files is not what was listed.
    """
    listing = read_json(inputs)
    if listing["source"] != plain(config.source):
        raise DataError(f"{inputs.name} lists another source than data.source says; run the stage `inputs` again")
    seen: set[bytes] = set()
    empty = duplicates = 0
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(_progress(config))
        writers = {split: stack.enter_context(written_split(documents, split)) for split in SPLITS}
        for document in read_documents(config.source, listing["files"]):
            bar.update(len(document))
            digest = hashlib.blake2b(document, digest_size=16).digest()
            if not document:
                empty += 1
            elif digest in seen:
                duplicates += 1
            else:
                seen.add(digest)
                writers[_split(digest, config)].write(document)
        counts = {split: {"documents": writer.documents, "bytes": writer.bytes} for split, writer in writers.items()}
        _check_none_empty(counts, config)
    write_json(documents / "record.json", {"splits": counts, "duplicates": duplicates, "empty": empty, **listing})
    made = ", ".join(f"{split} {count['documents']:,} documents ({count['bytes']:,} bytes)" for split, count in counts.items())
    print(f"documents: {made}; {duplicates:,} duplicates dropped")


def _progress(config: Data) -> tqdm:
    return tqdm(total=config.source.max_bytes, desc="download", unit="B", unit_scale=True, mininterval=0.5)


def _split(digest: bytes, config: Data) -> str:
    """Valid takes the lowest hashes and test the highest, so that changing one fraction leaves the other split alone."""
    place = int.from_bytes(digest[:8], "big") / 2**64
    if place < config.valid_fraction:
        return "valid"
    return "test" if place >= 1 - config.test_fraction else "train"


def _check_none_empty(counts: dict[str, dict[str, int]], config: Data) -> None:
    total = sum(count["documents"] for count in counts.values())
    for split, count in counts.items():
        if not count["documents"]:
            raise DataError(
                f"split {split} has no document: the source gave {total:,}, to share as valid_fraction {config.valid_fraction}, "
                f"test_fraction {config.test_fraction} and the rest; give more or shorter documents (data.source.max_bytes, "
                "or document_bytes for text files) or change the fractions"
            )
