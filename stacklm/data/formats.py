"""Local files of text, read as documents of bytes: .txt, .md, .jsonl and .parquet, each also as .gz or .zst."""

from __future__ import annotations

import io
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from stacklm.data import DataError

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
LONGEST = 4
"""A text file without blank lines is cut at a line end before a document exceeds this many times `document_bytes`."""


def read_file(path: Path, text_column: str, document_bytes: int) -> Iterator[bytes]:
    """Yield the documents of one file, in order, holding about one of them in memory.

    Raises `DataError` naming the file, and the line where there is one, if it is damaged or has no such column.
    """
    reader = reader_of(path)
    compression = COMPRESSIONS.get(path.suffix.lower())
    try:
        with io.BufferedReader(pa.input_stream(str(path), compression=compression)) as file:
            yield from reader(file, str(path), text_column, document_bytes)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


def reader_of(path: Path) -> Callable[[BinaryIO, str, str, int], Iterator[bytes]]:
    """The reader that the ending of a file's name asks for. Raises `DataError` where there is none."""
    endings = [ending.lower() for ending in path.suffixes]
    if endings and endings[-1] in COMPRESSIONS:
        endings.pop()
    if not endings or endings[-1] not in READERS:
        raise DataError(f"{path}: unsupported ending; a source's files end in {', '.join(READERS)}, each also with .gz or .zst")
    return READERS[endings[-1]]


def text_of(row: Mapping[str, Any], column: str, place: str) -> bytes:
    """A row's text as UTF-8. None is no text; a lone surrogate, which UTF-8 cannot say, keeps its three-byte form.

    Raises `DataError` naming the place if the row has no such column, or no text in it.
    """
    check_column(row, column, place)
    text = row[column]
    if text is None:
        return b""
    if not isinstance(text, str):
        raise DataError(f"{place}: column `{column}` is expected to hold a text, got {text!r} ({type(text).__name__})")
    return text.encode("utf-8", "surrogatepass")


def check_column(columns: Iterable[str], column: str, place: str) -> None:
    if column not in columns:
        raise DataError(f"{place}: no column `{column}`, only {', '.join(columns) or 'none'}; set data.source.text_column")


def _read_text(file: BinaryIO, place: str, text_column: str, document_bytes: int) -> Iterator[bytes]:
    """Cut after the first blank lines at or past `document_bytes`. The documents concatenate to the file."""
    if not document_bytes:
        yield file.read()
        return
    most = LONGEST * document_bytes
    lines, size, blank = [], 0, False
    while line := file.readline(most):
        at_blank_line = size >= document_bytes and blank and bool(line.strip())
        if lines and (at_blank_line or size + len(line) > most):
            yield b"".join(lines)
            lines, size = [], 0
        lines.append(line)
        size += len(line)
        blank = not line.strip()
    yield b"".join(lines)


def _read_jsonl(file: BinaryIO, place: str, text_column: str, document_bytes: int) -> Iterator[bytes]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{place}:{number}: not a line of JSON: {error}") from None
        if not isinstance(row, dict):
            raise DataError(f"{place}:{number}: expected a JSON object with a text, got {line[:40]!r}")
        yield text_of(row, text_column, f"{place}:{number}")


def _read_parquet(file: BinaryIO, place: str, text_column: str, document_bytes: int) -> Iterator[bytes]:
    with tempfile.TemporaryFile() as whole:  # a compressed stream cannot seek, and parquet is read from its end
        if not file.seekable():
            shutil.copyfileobj(file, whole)
            file = whole
        table = pq.ParquetFile(file)
        check_column(table.schema_arrow.names, text_column, place)
        kind = table.schema_arrow.field(text_column).type
        if kind not in (pa.string(), pa.large_string(), pa.binary(), pa.large_binary()):
            raise DataError(f"{place}: column `{text_column}` holds {kind}, not text; set data.source.text_column")
        for batch in table.iter_batches(batch_size=256, columns=[text_column]):
            for text in batch.column(0).cast(pa.large_binary()).to_pylist():
                yield text or b""


READERS = {".txt": _read_text, ".md": _read_text, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
