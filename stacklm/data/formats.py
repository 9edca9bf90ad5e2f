"""Local text files, read as documents of bytes: .txt, .md, .raw, .tokens, .jsonl and .parquet, each also as .gz or .zst.

`Account` counts files, rows, documents and bytes by outcome; `opened` alone compares a file's first bytes with its name; the
readers, one per format, come last.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import json
import re
import shutil
import tempfile
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from stacklm.data import DataError

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
EXAMPLES = 3


@dataclass
class Account:
    """Counts of what was read from a source.

    `files` were opened. `rows` of .jsonl, .parquet and hub data are documents or `null_texts`; `blank_lines` of .jsonl are not
    rows. `documents` of `bytes` in total were read; of these `empty` are empty, `duplicates` of `duplicate_bytes` are equal to an
    earlier one, and `over_max_bytes` (0 or 1) exceeded the limit; the others are kept. `files_not_read` came after that one.
    `byte_order_marks`, of 3 bytes each, are not text and in no other count. `not_utf8` documents are kept unchanged.
    """

    files: int = 0
    files_not_read: int = 0
    rows: int = 0
    blank_lines: int = 0
    null_texts: int = 0
    byte_order_marks: int = 0
    documents: int = 0
    bytes: int = 0
    empty: int = 0
    duplicates: int = 0
    duplicate_bytes: int = 0
    over_max_bytes: int = 0
    not_utf8: int = 0

    def row(self, text: bytes | None) -> Iterator[bytes]:
        """Count a row and yield its text, if any, without a byte-order mark."""
        self.rows += 1
        if text is None:
            self.null_texts += 1
        else:
            yield self.without_mark(text)

    def without_mark(self, text: bytes) -> bytes:
        """Remove a byte-order mark from the start of a text and count it."""
        if not text.startswith(BYTE_ORDER_MARK):
            return text
        self.byte_order_marks += 1
        return text[len(BYTE_ORDER_MARK) :]

    def document(self, text: bytes) -> None:
        """Count a document that was read."""
        self.documents += 1
        self.bytes += len(text)
        self.empty += not text
        try:
            text.decode()
        except UnicodeDecodeError:
            self.not_utf8 += 1

    def __str__(self) -> str:
        """The counts in one line, such as `3 files, 12 rows, 10 documents, 200 bytes read; 2 null texts`."""
        counts = {name.replace("_", " "): count for name, count in asdict(self).items()}
        read = [f"{counts.pop(name):,} {name}" for name in ("files", "rows", "documents", "bytes")]
        other = [f"{count:,} {name}" for name, count in counts.items() if count]
        return "; ".join([f"{', '.join(read)} read", *other])


def skipped_files(skipped: Mapping[str, str]) -> str:
    """Names of skipped files by reason: `5 skipped: dangling link (a.txt), hidden (.a, .b, .c and 1 more)`."""
    names: dict[str, list[str]] = {}
    for name, why in skipped.items():
        names.setdefault(why, []).append(name)
    reasons = []
    for why, some in names.items():
        more = f" and {len(some) - EXAMPLES:,} more" if len(some) > EXAMPLES else ""
        reasons.append(f"{why} ({', '.join(some[:EXAMPLES])}{more})")
    return ": ".join([f"{len(skipped):,} skipped", *([", ".join(reasons)] if reasons else [])])


HEAD_BYTES = 1 << 16
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
FORMATS = {".txt": "text", ".md": "text", ".raw": "text", ".tokens": "text", ".jsonl": "text", ".parquet": "Parquet"}
"""Formats by file extension; WikiText's files have `.raw` and `.tokens`."""
SIGNATURES = {
    "gzip": rb"\x1f\x8b",
    "zstd": rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18",  # a frame, or a skippable frame
    "bzip2": rb"BZh[1-9](?:1AY&SY|\x17\x72\x45\x38\x50\x90)",
    "xz": rb"\xfd7zXZ\x00",
    "lz4": rb"\x04\x22\x4d\x18",
    "compress (.Z)": rb"\x1f\x9d",
    "zip": rb"PK(?:\x03\x04|\x05\x06)",
    "7-Zip": rb"7z\xbc\xaf\x27\x1c",
    "RAR": rb"Rar!\x1a\x07",
    "tar": rb"(?s).{257}ustar",
    "Parquet": rb"PAR1[\x00-\x08\x0e-\x1f]",
    "encrypted Parquet": rb"PARE[\x00-\x08\x0e-\x1f]",
    "Arrow IPC": rb"ARROW1\x00",
    "PDF": rb"%PDF-",
    "UTF-32": rb"\xff\xfe\x00\x00|\x00\x00\xfe\xff",
    "UTF-16": rb"\xff\xfe|\xfe\xff",
    "GB 18030": rb"\x84\x31\x95\x33",
    "binary": rb"(?s).*\x00",
}
"""Patterns of a file's first bytes, by file type; the first match counts, and a file that matches none is text."""


@contextlib.contextmanager
def opened(path: Path, account: Account) -> Iterator[io.BufferedReader]:
    """The content of a file, decompressed according to its name, without a UTF-8 byte-order mark at its start.

    Raises `DataError` if the first bytes, before or after decompression, do not match the name.
    """
    ending, compression = endings(path)
    if compression:
        with path.open("rb") as raw:
            _check(path, raw.read(HEAD_BYTES), COMPRESSIONS[compression])
    stream = pa.input_stream(str(path), compression=COMPRESSIONS.get(compression))
    with io.BufferedReader(stream, HEAD_BYTES) as file:
        head = file.peek(HEAD_BYTES)
        _check(path, head, FORMATS[ending])
        if account.without_mark(head) != head:
            file.read(len(BYTE_ORDER_MARK))
        yield file


def endings(path: Path) -> tuple[str, str]:
    """The file extensions of the format and of the compression ('' if none), both in lower case.

    Raises `DataError` if the extension belongs to no known format.
    """
    *_, ending, compression = ["", "", *(part.lower() for part in path.suffixes)]
    if compression not in COMPRESSIONS:
        ending, compression = compression, ""
    if ending not in FORMATS:
        known = f"a source's files end in {', '.join(FORMATS)}, each also with .gz or .zst"
        raise DataError(f"{shown(path)}: unsupported ending; {known}")
    return ending, compression


def shown(path: Path | str) -> str:
    """A path or name for messages, which are UTF-8; other bytes are escaped as `\\xff`."""
    return f"{path}".encode("utf-8", "backslashreplace").decode().replace("\\udc", "\\x")


def _check(path: Path, head: bytes, wanted: str) -> None:
    kind = next((kind for kind, signature in SIGNATURES.items() if re.match(signature, head)), "text")
    if kind == wanted or not head:
        return
    if kind in ("UTF-16", "UTF-32", "GB 18030"):
        raise DataError(f"{shown(path)}: text in {kind}; convert it to UTF-8 (iconv -f {kind.replace(' ', '')} -t UTF-8)")
    if kind == "binary":
        what = "holds NUL bytes, so it is binary data, or text in UTF-16 or UTF-32"
        raise DataError(f"{shown(path)}: {what}; convert it to UTF-8 text or leave it out of data.source.paths")
    told = f"its name says {wanted}, but its content is {'plain text' if kind == 'text' else kind}"
    readable = {"gzip", "zstd", "Parquet", "text"}
    todo = "give it the ending of what it is" if kind in readable else f"unpack it, or convert it to {', '.join(FORMATS)}"
    raise DataError(f"{shown(path)}: {told}; {todo} (.gz: gzip, .zst: zstd; one compression at most)")


LONGEST = 4
"""Maximum size of a document in multiples of `document_bytes`: a text file without blank lines is cut at a line end before it."""
STRAY_BYTES = re.compile("[\udc80-\udcff]")
"""Bytes that are not UTF-8, as decoded by Python's `surrogateescape`."""
JOINED = {"Mn", "Mc", "Me", "Cs"}
"""Unicode categories of characters that belong to the one before them; `Cs`: bytes that are not UTF-8, see `STRAY_BYTES`."""
JOINER = "\u200d"


def read_file(path: Path, text_column: str, document_bytes: int, account: Account) -> Iterator[bytes]:
    """Yield the documents of one file in order, with about one in memory; rows are counted in `account`.

    Raises `DataError` naming the file, and the line or row if there is one, if it is damaged, lacks the column, or does not match
    its name.
    """
    reader = READERS[endings(path)[0]]
    before = account.rows
    try:
        with opened(path, account) as file:
            yield from reader(file, shown(path), text_column, document_bytes, account)
    except DataError:
        raise
    except (OSError, ValueError, pa.ArrowException) as error:
        rows = account.rows - before
        after = f" after row {rows:,}" if rows else ""
        raise DataError(f"{shown(path)}: cannot be read{after}: {error}; it may be cut short or damaged: fetch it again") from error


def text_of(row: Mapping[str, Any], column: str, place: str) -> bytes | None:
    """A row's text as UTF-8, or None for a null. A lone surrogate, which UTF-8 cannot represent, keeps its three-byte form.

    Raises `DataError` naming the place if the row lacks the column or its value is not text.
    """
    check_column(row.names if isinstance(row, _Repeated) else row, column, place)
    text = row[column]
    if text is None:
        return None
    if not isinstance(text, str):
        wrong = f"column `{column}` is expected to hold a text, got {text!r:.40} ({type(text).__name__})"
        raise DataError(f"{place}: {wrong}; correct the row or set data.source.text_column")
    return text.encode("utf-8", "surrogatepass")


def check_column(columns: Iterable[str], column: str, place: str) -> None:
    """Raise `DataError` unless exactly one column has that name."""
    found = list(columns).count(column)
    if not found:
        raise DataError(f"{place}: no column `{column}`, only {shown(', '.join(columns)) or 'none'}; set data.source.text_column")
    if found > 1:
        raise DataError(f"{place}: {found} columns are named `{column}`; rename all but one, or set data.source.text_column")


def _read_text(file: BinaryIO, place: str, text_column: str, document_bytes: int, account: Account) -> Iterator[bytes]:
    """Yield documents that end after the first blank lines at or past `document_bytes`. They concatenate to the file."""
    most = LONGEST * document_bytes or -1
    lines, size, blank = [], 0, False
    for line in _lines(file, most, place):
        at_blank_line = size >= document_bytes and blank and bool(line.strip())
        if lines and document_bytes and (at_blank_line or size + len(line) > most):
            yield b"".join(lines)
            lines, size = [], 0
        lines.append(line)
        size += len(line)
        blank = not line.strip()
    yield b"".join(lines)


def _lines(file: BinaryIO, most: int, place: str) -> Iterator[bytes]:
    """The lines of a file, longer ones in pieces of up to `most` bytes (-1: no limit). Raises `DataError` at a NUL byte."""
    number, rest = 1, b""
    while line := rest + file.readline(most - len(rest) if most > 0 else -1):
        if b"\0" in line:
            raise DataError(f"{place}:{number}: a NUL byte, so this is not plain text; remove it, or leave out the file")
        end = _cut(line) if len(line) == most and not line.endswith(b"\n") else len(line)
        line, rest = line[:end], line[end:]
        number += line.endswith(b"\n")
        yield line


def _cut(line: bytes) -> int:
    """The position at which to cut a piece of a longer line: after white space, else between characters, never inside one.

    Only the second half is searched; there combining marks, joined emoji and their modifiers stay with their base character.
    """
    half = len(line) // 2
    space = max(line.rfind(mark, half, -1) for mark in (b" ", b"\t", b"\r"))
    if space >= half:
        return space + 1
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    text = decoder.decode(line)
    whole = len(line) - len(decoder.getstate()[0])
    end = whole
    for before, after in zip(text[-2::-1], text[:0:-1], strict=True):  # from the end of the line
        end -= len(after.encode("utf-8", "surrogateescape"))
        if end <= half:
            break
        joined = unicodedata.category(after) in JOINED or JOINER in (before, after) or "\U0001f3fb" <= after <= "\U0001f3ff"
        if not joined:
            return end
    return whole


def _read_jsonl(file: BinaryIO, place: str, text_column: str, document_bytes: int, account: Account) -> Iterator[bytes]:
    for where, row in json_rows(file, place, account):
        yield from account.row(text_of(row, text_column, where))


def json_rows(file: BinaryIO, place: str, account: Account) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the place and the JSON object of each line except blank ones, which are counted in `account`.

    Lines end in LF, CR LF or CR. A line may start with a byte-order mark, as in concatenated files. Raises `DataError` with the
    place of a line that is not a JSON object.
    """
    for number, line in enumerate(io.TextIOWrapper(file, "utf-8", "surrogateescape"), 1):
        line = line.removeprefix(BYTE_ORDER_MARK.decode())
        if line.strip(" \t\n"):
            yield f"{place}:{number}", _json_object(line, f"{place}:{number}")
        else:
            account.blank_lines += 1


def _json_object(line: str, place: str) -> dict:
    if stray := STRAY_BYTES.search(line):
        byte = f"byte {ord(stray[0]) - 0xDC00:#x} at character {stray.start() + 1}"
        raise DataError(f"{place}: {byte} is not UTF-8; convert the file to UTF-8")
    try:
        row = JSON.decode(line)
    except RecursionError:
        raise DataError(f"{place}: JSON nested too deeply to be read; drop the nested field from this line") from None
    except ValueError as error:
        raise DataError(f"{place}: not a line of JSON: {error}; a .jsonl file has one object per line") from None
    if not isinstance(row, dict):
        raise DataError(f"{place}: expected a JSON object with a text, got {line[:40]!r}; a .jsonl file has one object per line")
    return row


class _Repeated(dict):
    """A JSON object with duplicate names. `names` are all names, with duplicates."""

    names: list[str]


def _object(pairs: list[tuple[str, Any]]) -> dict:
    row = dict(pairs)
    if len(row) < len(pairs):
        row = _Repeated(row)
        row.names = [name for name, _ in pairs]
    return row


def _integer(digits: str) -> int | float:
    """A number in another field. Python's own conversion refuses thousands of digits, since it takes quadratic time."""
    return int(digits) if len(digits) < 400 else float(digits)


JSON = json.JSONDecoder(object_pairs_hook=_object, parse_int=_integer)


def _read_parquet(file: BinaryIO, place: str, text_column: str, document_bytes: int, account: Account) -> Iterator[bytes]:
    with tempfile.TemporaryFile() as whole:  # a compressed stream cannot seek, and parquet is read from the end
        if not file.seekable():
            shutil.copyfileobj(file, whole)
            file = whole
        table = pq.ParquetFile(file, page_checksum_verification=True)
        check_column(table.schema_arrow.names, text_column, place)
        kind = table.schema_arrow.field(text_column).type
        if not _is_text(kind):
            raise DataError(f"{place}: column `{text_column}` holds {kind}, not text; set data.source.text_column")
        for batch in table.iter_batches(batch_size=256, columns=[text_column]):
            column = batch.column(text_column)
            if isinstance(column, pa.ExtensionArray):
                column = column.storage
            for text in column.cast(pa.large_binary()).to_pylist():
                yield from account.row(text)


def _is_text(kind: pa.DataType) -> bool:
    """Whether a column holds text or bytes, in any of Arrow's layouts; a column of type null holds null texts."""
    if isinstance(kind, pa.BaseExtensionType):
        return _is_text(kind.storage_type)
    if pa.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    plain = (pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.binary_view(), pa.null())
    return kind in plain or pa.types.is_fixed_size_binary(kind)


TEXTS = dict.fromkeys((".txt", ".md", ".raw", ".tokens"), _read_text)
READERS = {**TEXTS, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
