"""Readers of local files."""

import gzip
import json
import random
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stacklm.data import DataError
from stacklm.data.formats import LONGEST, Account, endings, read_file


def compress(path, data):
    """Write bytes as the ending of the path says."""
    kind = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix)
    with pa.output_stream(str(path), compression=kind) as file:
        file.write(data)
    return path


def read(path, column="text", document_bytes=100):
    return list(read_file(path, column, document_bytes, Account()))


def read_bytes(path, data, document_bytes=100):
    path.write_bytes(data)
    return read(path, document_bytes=document_bytes)


def read_table(path, columns, column="text"):
    pq.write_table(pa.table(columns), path)
    return read(path, column)


@pytest.mark.parametrize("document_bytes", [1, 2, 7, 64, 1000])
def test_text_pieces_concatenate_to_the_file_whatever_it_holds(tmp_path, document_bytes):
    rng = random.Random(document_bytes)
    for _ in range(40):
        alphabet = rng.choice([b"a\n", b"ab \n\r\n\t", bytes(range(1, 256)), b"\n", b"x", "é中😀".encode()])
        data = b"." + bytes(rng.choice(alphabet) for _ in range(rng.randrange(600)))  # the point: no signature by chance
        pieces = read_bytes(tmp_path / "a.txt", data, document_bytes)
        assert b"".join(pieces) == data
        assert max(map(len, pieces)) <= LONGEST * document_bytes


def test_text_is_cut_at_the_first_blank_line_past_the_wanted_size(tmp_path):
    text = b"one\ntwo\n\nthree\n \r\n\nfour\n\nfive"
    assert read_bytes(tmp_path / "a.md", text, 12) == [b"one\ntwo\n\nthree\n \r\n\n", b"four\n\nfive"]
    assert read_bytes(tmp_path / "a.md", text, 1000) == [text]


def test_text_without_blank_lines_is_cut_at_a_line_end(tmp_path):
    assert set(read_bytes(tmp_path / "a.txt", b"0123456\n" * 100, 10)) == {b"0123456\n" * 5}


def test_zero_keeps_a_text_file_whole(tmp_path):
    assert read_bytes(tmp_path / "a.txt", b"a\n\n" * 50_000, 0) == [b"a\n\n" * 50_000]


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
    assert read_bytes(tmp_path / "a.txt.gz", gzip.compress(b"one ") + gzip.compress(b"two")) == [b"one two"]
    frame = compress(tmp_path / "a.txt.zst", b"one ").read_bytes()
    assert read_bytes(tmp_path / "b.txt.zst", frame * 3) == [b"one one one "]


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_a_truncated_or_foreign_file_is_an_error_that_names_it(tmp_path, ending):
    whole = compress(tmp_path / f"whole.txt{ending}", b"." + random.Random(1).randbytes(50_000).replace(b"\0", b"")).read_bytes()
    for data, message in ((whole[:-20_000], "cannot be read"), (b"no archive", "its name says")):
        with pytest.raises(DataError, match=f"a.txt{ending}: {message}"):
            read_bytes(tmp_path / f"a.txt{ending}", data)


def test_a_damaged_parquet_file_is_an_error_that_names_it(tmp_path):
    with pytest.raises(DataError, match=r"a\.parquet: cannot be read"):
        read_bytes(tmp_path / "a.parquet", b"PAR1\x15 no more")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": ', "not a line of JSON"),
        ('{"body": "b", "title": "t"}', r"no column `text`, only body, title; set data\.source\.text_column"),
        ("[1, 2]", "expected a JSON object"),
        ('{"text": 5}', r"column `text` is expected to hold a text, got 5 \(int\)"),
    ],
)
def test_jsonl_errors_name_the_file_the_line_and_the_keys(tmp_path, line, message):
    """A blank line is no error, and counts."""
    with pytest.raises(DataError, match=rf"a\.jsonl:3: {message}"):
        read_bytes(tmp_path / "a.jsonl", f'{{"text": "a"}}\n\n{line}\n'.encode())


def test_jsonl_counts_null_texts_and_keeps_lone_surrogates(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": null}\n\n{"text": "a\\ud800b"}\n{"text": "\\ud83d\\ude00"}')
    account = Account()
    assert list(read_file(path, "text", 100, account)) == [b"a\xed\xa0\x80b", "\U0001f600".encode()]
    assert (account.rows, account.null_texts, account.blank_lines) == (3, 1, 1)


def test_parquet_of_bytes_passes_through_and_other_columns_are_errors(tmp_path):
    path = tmp_path / "a.parquet"
    rows = [bytes(range(256)), None, b"\xff"]
    pq.write_table(pa.table({"raw": pa.array(rows, pa.binary()), "n": [1, 2, 3]}), path)
    account = Account()
    assert list(read_file(path, "raw", 100, account)) == [bytes(range(256)), b"\xff"]
    assert (account.rows, account.null_texts) == (3, 1)
    with pytest.raises(DataError, match="no column `text`, only raw, n"):
        read(path)
    with pytest.raises(DataError, match="column `n` holds int64, not text"):
        read(path, "n")


@pytest.mark.parametrize("name", ["a.csv", "a", "a.gz", "a.txt.bz2", ".txt"])
def test_an_unsupported_ending_names_the_supported_ones(tmp_path, name):
    with pytest.raises(DataError, match=re.escape("end in .txt, .md, .raw, .tokens, .jsonl, .parquet, each also with .gz or .zst")):
        endings(tmp_path / name)


def test_endings_are_read_in_either_case(tmp_path):
    assert read_bytes(tmp_path / "A.TXT.GZ", gzip.compress(b"text")) == [b"text"]


def test_a_long_line_is_cut_at_white_space_else_between_whole_characters(tmp_path):
    path = tmp_path / "a.txt"
    units = ["中", "é", "e\u0301", "\U0001f600", "\U0001f469\u200d\U0001f4bb", "\U0001f44d\U0001f3fd", "a"]
    rng = random.Random(1)
    for unit in [*units, None]:
        for extra in range(5):
            text = "x" * extra + "".join([unit or rng.choice(units) for _ in range(400)])
            pieces = [piece.decode() for piece in read_bytes(path, text.encode(), 20)]
            assert "".join(pieces) == text
            assert len(pieces) > 4
            for piece in pieces[1:]:
                assert piece[0] not in "\u0301\u200d\U0001f3fd"
            for piece in pieces[:-1]:
                assert piece[-1] != "\u200d"
    assert all(piece.endswith(b" ") for piece in read_bytes(path, b"some words of one line " * 100, 20))
    assert all(piece[-1:] in (b"\r", b" ") for piece in read_bytes(path, b"lines of an old system\r" * 100, 20))


def test_every_layout_of_text_in_parquet_is_read(tmp_path):
    path = tmp_path / "a.parquet"
    texts = ["one", None, "zwei é", "one"]
    plain = pa.array(texts)
    layouts = [plain.cast(kind) for kind in (pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.binary_view())]
    layouts += [plain, plain.dictionary_encode(), plain.cast(pa.binary()).dictionary_encode()]
    layouts += [pa.ExtensionArray.from_storage(pa.json_(), plain), pa.chunked_array([texts[:1], texts[1:]])]
    for column in layouts:
        assert read_table(path, {"n": [1, 2, 3, 4], "text": column}) == [b"one", "zwei é".encode(), b"one"], column.type
    assert read_table(path, {"text": pa.array([b"abc", None], pa.binary(3))}) == [b"abc"]
    pq.write_table(pa.table({"text": pa.nulls(3)}), path)
    account = Account()
    assert list(read_file(path, "text", 100, account)) == []
    assert (account.rows, account.null_texts) == (3, 3)


@pytest.mark.parametrize(
    "column",
    [[{"text": "a"}], [["a"]], [1.5], [True], pa.array([[("a", "b")]], pa.map_(pa.string(), pa.string()))],
    ids=["struct", "list", "float", "bool", "map"],
)
def test_columns_that_hold_no_text_are_errors_that_say_what_they_hold(tmp_path, column):
    with pytest.raises(DataError, match=r"a\.parquet: column `text` holds .*, not text; set data\.source\.text_column"):
        read_table(tmp_path / "a.parquet", {"text": column})


def test_two_columns_of_one_name_are_an_error_unless_another_is_read(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"]), pa.array(["c"])], ["text", "text", "body"]), path)
    with pytest.raises(DataError, match=r"a\.parquet: 2 columns are named `text`; rename all but one"):
        read(path)
    assert read(path, "body") == [b"c"]
    assert read_table(path, {"text.more": ["x"], "text": ["y"]}) == [b"y"]


def test_json_that_is_odd_in_another_field_is_read_and_in_the_text_is_an_error_with_its_line(tmp_path):
    path = tmp_path / "a.jsonl"
    digits, deep = "9" * 5_000, "[" * 3_000 + "]" * 3_000
    for other in (digits, f"-{digits}", "NaN", "-Infinity", "1e999", r'"\ud800"', '{"a": 1, "a": 2}', '{"text": 1, "text": 2}'):
        assert read_bytes(path, f'{{"text": "good", "other": {other}}}'.encode()) == [b"good"], other
    wrong = {
        f'{{"text": "a", "other": {deep}}}': "nested too deeply",
        deep: "nested too deeply",
        '{"text": "a", "text": "b"}': "2 columns are named `text`",
        '{"text": NaN}': r"expected to hold a text, got nan \(float\)",
        f'{{"text": {digits}}}': r"expected to hold a text, got inf \(float\)",
        '{"text": "a"} {"text": "b"}': "not a line of JSON: Extra data",
        '{"text": "tab\t"}': "not a line of JSON: Invalid control character",
        "nul\0": "holds NUL bytes",
    }
    for line, message in wrong.items():
        with pytest.raises(DataError, match=rf"a\.jsonl(:2)?: .*{message}"):
            read_bytes(path, b'{"text": "good"}\n' + line.encode())
    with pytest.raises(DataError, match=r"a\.jsonl:2: byte 0xe9 at character 14 is not UTF-8"):
        read_bytes(path, b'{"text": "good"}\n{"text": "caf\xe9"}\n')


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_of_json_end_in_any_way(tmp_path, end):
    path = tmp_path / "a.jsonl"
    path.write_bytes(end.join([r'{"text": "a\r\nb"}', "", '{"text": "c\u2028d"}', "{"]).encode())
    rows = read_file(path, "text", 100, Account())
    assert [next(rows), next(rows)] == [b"a\r\nb", "c\u2028d".encode()]
    with pytest.raises(DataError, match=r"a\.jsonl:4: not a line of JSON"):
        next(rows)


def test_damaged_files_are_errors_that_name_them(tmp_path):
    """Cut short, and with bits changed, at many places: each file is read or refused by its name."""
    rng = random.Random(3)
    rows = [f"{i} {rng.random()}" for i in range(2_000)]
    pq.write_table(pa.table({"text": rows}), tmp_path / "table", row_group_size=200)
    content = {"a.parquet": (tmp_path / "table").read_bytes()}
    text = "\n".join(json.dumps({"text": row}) for row in rows).encode()
    for ending in (".gz", ".zst"):
        content[f"a.jsonl{ending}"] = compress(tmp_path / f"b{ending}", text).read_bytes()
    for name, data in content.items():
        path = tmp_path / name
        refused = 0
        for _ in range(60):
            damaged = bytearray(data[: rng.randrange(1, len(data))] if rng.random() < 0.5 else data)
            for _ in range(3):
                damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
            try:
                read_bytes(path, damaged)
            except DataError as error:
                assert str(error).startswith(str(path))
                refused += 1
        assert refused > 30, name


def test_pages_of_parquet_that_differ_from_their_checksums_are_refused(tmp_path):
    path = tmp_path / "a.parquet"
    options = {"compression": "none", "use_dictionary": False, "write_statistics": False, "write_page_checksum": True}
    pq.write_table(pa.table({"text": ["some plain text"]}), path, **options)
    data = path.read_bytes()
    assert read(path) == [b"some plain text"]
    with pytest.raises(DataError, match=r"a\.parquet: cannot be read: .*checksum"):
        read_bytes(path, data.replace(b"some plain text", b"some other text", 1))
