"""Documents on disk."""

import random

import pyarrow.parquet as pq
import pytest

from stacklm.data import DataError, documents
from stacklm.data.documents import read_split, written_split


def test_documents_come_back_as_written_in_row_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "ROW_GROUP_BYTES", 10_000)
    rng = random.Random(1)
    wanted = [rng.randbytes(rng.randrange(2_000)) for _ in range(300)]
    with written_split(tmp_path, "train") as writer:
        for document in wanted:
            writer.write(document)
    assert list(read_split(tmp_path, "train")) == wanted
    assert (writer.documents, writer.bytes) == (300, sum(map(len, wanted)))
    table = pq.ParquetFile(tmp_path / "train.parquet")
    assert table.schema_arrow.names == ["text"]
    assert table.num_row_groups > 20
    assert table.metadata.row_group(0).column(0).compression == "ZSTD"


def test_an_error_leaves_no_file(tmp_path):
    with pytest.raises(RuntimeError), written_split(tmp_path, "train") as writer:
        writer.write(b"text")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["missing", "cut", "text"])
def test_a_damaged_file_is_an_error_that_names_it_and_the_stage(tmp_path, damage):
    with written_split(tmp_path, "train") as writer:
        writer.write(b"some text " * 1000)
    path = tmp_path / "train.parquet"
    data = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(data[:-20] if damage == "cut" else b"text")
    with pytest.raises(DataError, match=r"train\.parquet: cannot be read: .*; run the stage `download` again"):
        list(read_split(tmp_path, "train"))
