"""Detecting the type of a file by its first bytes, compared with its name."""

import bz2
import gzip
import io
import json
import lzma
import tarfile
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stacklm.data import DataError
from stacklm.data.formats import Account, read_file

TEXT = "Some text, é, in two lines.\nThe other one: 中文.\n"
LINE = json.dumps({"text": TEXT}).encode()


def zstd(data):
    return pa.compress(data, "zstd", asbytes=True)


def parquet(text):
    file = io.BytesIO()
    pq.write_table(pa.table({"text": [text]}), file)
    return file.getvalue()


def zipped(data):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.txt", data)
    return file.getvalue()


def tarred(data):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        member = tarfile.TarInfo("a.txt")
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))
    return file.getvalue()


def read(path, data, account=None):
    path.write_bytes(data)
    return list(read_file(path, "text", 1000, account or Account()))


PLAIN = TEXT.encode()
GZIPPED = gzip.compress(PLAIN, mtime=0)  # the same bytes in every process, whose tests bear the same names
OTHERS = {
    "gzip": GZIPPED,
    "zstd": zstd(PLAIN),
    "a skippable frame of zstd": b"\x50\x2a\x4d\x18\x01\x00\x00\x00x" + zstd(PLAIN),
    "bzip2": bz2.compress(PLAIN),
    "bzip2 of nothing": bz2.compress(b""),
    "xz": lzma.compress(PLAIN),
    "lz4": pa.compress(PLAIN, "lz4", asbytes=True),
    "zip": zipped(PLAIN),
    "an empty zip": zipped(b"")[-22:],
    "tar": tarred(PLAIN),
    "parquet": parquet(TEXT),
    "PDF": b"%PDF-1.7\n...",
    "NUL": b"text\0and more",
    "UTF-16 with mark": TEXT.encode("utf-16"),
    "UTF-16 BE with mark": "\ufeff".encode("utf-16-be") + TEXT.encode("utf-16-be"),
    "UTF-16 without": TEXT.encode("utf-16-le"),
    "UTF-16 BE without": TEXT.encode("utf-16-be"),
    "UTF-32 with mark": TEXT.encode("utf-32"),
    "UTF-32 BE with mark": "\ufeff".encode("utf-32-be") + TEXT.encode("utf-32-be"),
    "UTF-32 without": TEXT.encode("utf-32-le"),
    "GB 18030": ("\ufeff" + TEXT).encode("gb18030"),
}


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.jsonl", "a.txt.gz", "a.jsonl.zst"])
def test_what_is_not_plain_text_is_refused_under_the_name_of_text(tmp_path, kind, name):
    data = OTHERS[kind]
    wrapped = gzip.compress(data) if name.endswith(".gz") else zstd(data) if name.endswith(".zst") else data
    with pytest.raises(DataError, match=rf"{name}: (its name says text, but its content is|text in|holds NUL bytes)"):
        read(tmp_path / name, wrapped)


@pytest.mark.parametrize(
    ("name", "data"),
    [("a.txt.gz", PLAIN), ("a.txt.zst", GZIPPED), ("a.jsonl.gz", zstd(LINE))],
    ids=["plain", "gzip", "zstd"],
)
def test_what_is_not_compressed_so_is_refused(tmp_path, name, data):
    with pytest.raises(DataError, match=rf"{name}: its name says (gzip|zstd), but its content is .*; give it the ending"):
        read(tmp_path / name, data)


@pytest.mark.parametrize(
    "data",
    [PLAIN, LINE, GZIPPED, b"PAR2 is no parquet", b"PARE\x15"],
    ids=["text", "JSON", "gzip", "PAR2", "PARE"],
)
@pytest.mark.parametrize("name", ["a.parquet", "a.parquet.gz"])
def test_what_is_not_parquet_is_refused(tmp_path, name, data):
    wrapped = gzip.compress(data) if name.endswith(".gz") else data
    with pytest.raises(DataError, match=rf"{name}: its name says Parquet"):
        read(tmp_path / name, wrapped)


@pytest.mark.parametrize("text", ["PAR1 is a word", "BZhang said", "PK", "Rar!", "7z", "BZh9", "PAR1\n", "BZh9\n"])
def test_text_may_begin_like_a_signature(tmp_path, text):
    assert read(tmp_path / "a.txt", text.encode()) == [text.encode()]


def test_a_nul_byte_far_into_a_text_is_refused_with_its_line(tmp_path):
    with pytest.raises(DataError, match=r"a\.txt:20001: a NUL byte"):
        read(tmp_path / "a.txt", b"many lines\n" * 20_000 + b"one \0\n")


def test_a_byte_order_mark_goes_in_every_format_and_is_counted(tmp_path):
    mark = b"\xef\xbb\xbf"
    row = json.dumps({"text": "\ufeff" + TEXT}).encode()
    cases = {
        "a.txt": mark + PLAIN,
        "a.txt.gz": gzip.compress(mark + PLAIN),
        "a.md.zst": zstd(mark + PLAIN),
        "a.jsonl": mark + LINE,
        "b.jsonl": row,
        "a.parquet": parquet("\ufeff" + TEXT),
    }
    for name, data in cases.items():
        account = Account()
        assert read(tmp_path / name, data, account) == [PLAIN], name
        assert account.byte_order_marks == 1, name
    assert read(tmp_path / "c.jsonl", mark + LINE + b"\n" + mark + LINE) == [PLAIN, PLAIN]
    assert read(tmp_path / "d.txt", mark) == [b""]
    assert read(tmp_path / "e.txt", b"a" + mark) == [b"a" + mark]
