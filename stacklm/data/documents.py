"""The documents of a dataset on disk: one parquet file per split, with one column `text` of bytes."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from stacklm.data import DataError
from stacklm.files import written_aside

SPLITS = ("train", "valid", "test")
SCHEMA = pa.schema([pa.field("text", pa.binary(), nullable=False)])
ROW_GROUP_BYTES = 4 << 20


class TextRecord:
    """Identifies a text: the number, total bytes and digest of the documents added, in order."""

    def __init__(self) -> None:
        self.documents, self.bytes = 0, 0
        self._digest = hashlib.sha256()

    def add(self, document: bytes) -> None:
        self.documents += 1
        self.bytes += len(document)
        self._digest.update(hashlib.sha256(document).digest())

    def plain(self) -> dict[str, int | str]:
        """The record as written to JSON; `sha256` is the hash of the concatenated SHA-256 digests of the documents."""
        return {"documents": self.documents, "bytes": self.bytes, "sha256": self._digest.hexdigest()}


class DocumentWriter(TextRecord):
    """Writes documents in row groups of a few MiB."""

    def __init__(self, table: pq.ParquetWriter) -> None:
        super().__init__()
        self._table, self._waiting, self._waiting_bytes = table, list[bytes](), 0

    def write(self, document: bytes) -> None:
        self.add(document)
        self._waiting.append(document)
        self._waiting_bytes += len(document)
        if self._waiting_bytes >= ROW_GROUP_BYTES:
            self.flush()

    def flush(self) -> None:
        if self._waiting:
            self._table.write_batch(pa.record_batch([pa.array(self._waiting, pa.binary())], schema=SCHEMA))
            self._waiting, self._waiting_bytes = [], 0


@contextlib.contextmanager
def written_split(folder: Path, split: str) -> Iterator[DocumentWriter]:
    """Yield a writer for the file of one split, which is complete or absent afterwards."""
    options = {"compression": "zstd", "use_dictionary": False, "write_statistics": False}
    with written_aside(folder / f"{split}.parquet") as aside, pq.ParquetWriter(aside, SCHEMA, **options) as table:
        writer = DocumentWriter(table)
        yield writer
        writer.flush()


def read_split(folder: Path, split: str) -> Iterator[bytes]:
    """Yield the documents of one split in order, with only a few in memory. Raises `DataError` for a damaged file."""
    path = folder / f"{split}.parquet"
    try:
        with pq.ParquetFile(path) as table:
            for batch in table.iter_batches(batch_size=256):
                yield from batch.column(0).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be read: {error}; run the stage `download` again") from error
