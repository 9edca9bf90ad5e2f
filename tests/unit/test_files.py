"""Files are complete or absent."""

from __future__ import annotations

import pytest

from stacklm.files import publish, read_json, read_jsonl, sha256, write_json, write_text, written_aside


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path):
    target = tmp_path / "a.txt"
    write_text(target, "old\n")
    with pytest.raises(OSError, match="disk full"), written_aside(target) as aside:
        aside.write_text("half")
        raise OSError("disk full")
    assert target.read_text() == "old\n"
    assert names(tmp_path) == ["a.txt"]


def test_json_keeps_order_and_refuses_what_json_cannot_say(tmp_path):
    write_json(tmp_path / "a.json", {"b": 0.1, "a": "ü"})
    assert (tmp_path / "a.json").read_bytes() == '{\n  "b": 0.1,\n  "a": "ü"\n}\n'.encode()
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", float("nan"))
    assert read_json(tmp_path / "a.json") == {"b": 0.1, "a": "ü"}


def test_a_line_cut_short_by_a_kill_is_left_out(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert read_jsonl(tmp_path / "rows.jsonl") == [{"step": 1}, {"step": 2}]
    assert read_jsonl(tmp_path / "none.jsonl") == []


def test_publish_replaces_files_and_folders_as_a_whole(tmp_path):
    source, target = tmp_path / "source", tmp_path / "deep" / "target"
    source.mkdir()
    (source / "new").write_text("1")
    target.mkdir(parents=True)
    (target / "left over").write_text("2")
    publish(source, target)
    assert names(target) == ["new"]
    assert sha256(source) == sha256(target)
    publish(source / "new", target)
    assert target.read_text() == "1"
    assert names(tmp_path / "deep") == ["target"]


def test_the_hash_of_a_folder_sees_names_and_contents(tmp_path):
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "a").write_text("1")
    first = sha256(tmp_path / "f")
    (tmp_path / "f" / "a").rename(tmp_path / "f" / "b")
    second = sha256(tmp_path / "f")
    (tmp_path / "f" / "b").write_text("2")
    assert len({first, second, sha256(tmp_path / "f")}) == 3
