"""Readers of local files."""

import gzip
import json
import random
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stacklm.data import DataError
from stacklm.data.formats import LONGEST, read_file, reader_of


def compress(path, data):
    """Write bytes as the ending of the path says."""
    kind = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix)
    with pa.output_stream(str(path), compression=kind) as file:
        file.write(data)
    return path


def read(path, column="text", document_bytes=100):
    return list(read_file(path, column, document_bytes))


@pytest.mark.parametrize("document_bytes", [1, 2, 7, 64, 1000])
def test_text_pieces_concatenate_to_the_file_whatever_it_holds(tmp_path, document_bytes):
    rng = random.Random(document_bytes)
    for _ in range(40):
        alphabet = rng.choice([b"a\n", b"ab \n\r\n\t", bytes(range(256)), b"\n", b"x"])
        data = bytes(rng.choice(alphabet) for _ in range(rng.randrange(600)))
        path = tmp_path / "a.txt"
        path.write_bytes(data)
        pieces = read(path, document_bytes=document_bytes)
        assert b"".join(pieces) == data
        assert max(map(len, pieces)) <= LONGEST * document_bytes


def test_text_is_cut_at_the_first_blank_line_past_the_wanted_size(tmp_path):
    path = tmp_path / "a.md"
    path.write_bytes(b"one\ntwo\n\nthree\n \r\n\nfour\n\nfive")
    assert read(path, document_bytes=12) == [b"one\ntwo\n\nthree\n \r\n\n", b"four\n\nfive"]
    assert read(path, document_bytes=1000) == [path.read_bytes()]


def test_text_without_blank_lines_is_cut_at_a_line_end(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"0123456\n" * 100)
    pieces = read(path, document_bytes=10)
    assert set(pieces) == {b"0123456\n" * 5}


def test_zero_keeps_a_text_file_whole(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"a\n\n" * 50_000)
    assert read(path, document_bytes=0) == [path.read_bytes()]


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
def test_every_format_reads_the_same_documents_under_every_compression(tmp_path, ending):
    texts = ["plain", "é\u3000中\U0001f600", "two\n\nparagraphs", "x" * 100_000]
    table = tmp_path / "table"
    pq.write_table(pa.table({"n": [1, 2, 3, 4], "text": texts}), table)
    lines = "".join(json.dumps({"n": 1, "text": text}) + "\n" for text in texts)
    wanted = [text.encode() for text in texts]
    assert read(compress(tmp_path / f"a.parquet{ending}", table.read_bytes())) == wanted
    assert read(compress(tmp_path / f"a.jsonl{ending}", lines.encode())) == wanted
    assert b"".join(read(compress(tmp_path / f"a.txt{ending}", b"".join(wanted)))) == b"".join(wanted)


def test_several_compressed_frames_in_one_file_are_all_read(tmp_path):
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(b"one ") + gzip.compress(b"two"))
    assert read(path) == [b"one two"]
    frame = compress(tmp_path / "a.txt.zst", b"one ").read_bytes()
    path = tmp_path / "b.txt.zst"
    path.write_bytes(frame * 3)
    assert read(path) == [b"one one one "]


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_a_truncated_or_foreign_file_is_an_error_that_names_it(tmp_path, ending):
    whole = compress(tmp_path / f"whole.txt{ending}", random.Random(1).randbytes(50_000)).read_bytes()
    for name, data in {"cut": whole[:-20_000], "foreign": b"this is no archive"}.items():
        path = tmp_path / f"{name}.txt{ending}"
        path.write_bytes(data)
        with pytest.raises(DataError, match=f"{name}.txt{ending}: cannot be read"):
            read(path)


def test_a_damaged_parquet_file_is_an_error_that_names_it(tmp_path):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 no more")
    with pytest.raises(DataError, match=r"a\.parquet: cannot be read"):
        read(path)


def test_jsonl_errors_name_the_file_the_line_and_the_keys(tmp_path):
    path = tmp_path / "a.jsonl"
    good = '{"text": "a"}\n\n'  # a blank line is no error, and counts
    cases = {
        '{"text": ': r"a\.jsonl:3: not a line of JSON",
        '{"body": "b", "title": "t"}': r"a\.jsonl:3: no column `text`, only body, title; set data\.source\.text_column",
        "[1, 2]": r"a\.jsonl:3: expected a JSON object",
        '{"text": 5}': r"a\.jsonl:3: column `text` is expected to hold a text, got 5 \(int\)",
    }
    for line, message in cases.items():
        path.write_text(good + line + "\n")
        with pytest.raises(DataError, match=message):
            read(path)


def test_jsonl_takes_null_as_no_text_and_keeps_lone_surrogates(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": null}\n{"text": "a\\ud800b"}\n{"text": "\\ud83d\\ude00"}')
    assert read(path) == [b"", b"a\xed\xa0\x80b", "\U0001f600".encode()]


def test_parquet_of_bytes_passes_through_and_other_columns_are_errors(tmp_path):
    path = tmp_path / "a.parquet"
    rows = [bytes(range(256)), None, b"\xff"]
    pq.write_table(pa.table({"raw": pa.array(rows, pa.binary()), "n": [1, 2, 3]}), path)
    assert read(path, "raw") == [bytes(range(256)), b"", b"\xff"]
    with pytest.raises(DataError, match="no column `text`, only raw, n"):
        read(path)
    with pytest.raises(DataError, match="column `n` holds int64, not text"):
        read(path, "n")


@pytest.mark.parametrize("name", ["a.csv", "a", "a.gz", "a.txt.bz2", ".txt"])
def test_an_unsupported_ending_names_the_supported_ones(tmp_path, name):
    with pytest.raises(DataError, match=re.escape("end in .txt, .md, .jsonl, .parquet, each also with .gz or .zst")):
        reader_of(tmp_path / name)


def test_endings_are_read_in_either_case(tmp_path):
    path = tmp_path / "A.TXT.GZ"
    path.write_bytes(gzip.compress(b"text"))
    assert read(path) == [b"text"]
