"""The contents of a source, and its documents."""

import gzip
import json
import platform
import random
from pathlib import Path

import pytest

from stacklm.config.data import Data, FilesSource, HuggingFaceSource, StdlibSource
from stacklm.data import DataError, sources
from stacklm.data.formats import Account
from stacklm.data.sources import DOCUMENT_BYTES, cut, is_table, library, list_inputs, read_documents
from stacklm.files import read_json, sha256, write_jsonl
from support.corpus import write_texts

pytestmark = pytest.mark.usefixtures("project")


def listed(source):
    list_inputs(Data(source), Path("inputs.json"))
    return read_json(Path("inputs.json"))


def documents(source):
    return list(read_documents(source, listed(source)["files"], Account()))


def test_stdlib_lists_this_interpreters_library_in_order_up_to_the_cap():
    listing = listed(StdlibSource(max_bytes=1_000_000))
    names = [file["name"] for file in listing["files"]]
    assert listing["python"] == platform.python_version()
    assert names == sorted(names)
    total = sum(file["bytes"] for file in listing["files"])
    assert 500_000 < total <= 1_000_000
    for file in listing["files"][:3]:
        assert file["sha256"] == sha256(Path(json.__file__).parent.parent / file["name"])


def test_stdlib_leaves_out_tests_other_packages_and_caches():
    names = [file["name"] for file in listed(StdlibSource(max_bytes=10**9))["files"]]
    assert {"json/decoder.py", "asyncio/tasks.py", "typing.py", "ast.py", "idlelib/help.py"} <= set(names)
    assert not {"pydoc_data/topics.py", "html/entities.py", "stringprep.py", "keyword.py", "token.py"} & set(names)
    folders = {part for name in names for part in name.split("/")[:-1]}
    assert not folders & {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    assert all(name.endswith(".py") for name in names)


def test_stdlib_documents_are_pieces_of_the_files_in_order_and_every_byte_is_in_one():
    source = StdlibSource(max_bytes=300_000)
    library = Path(json.__file__).parent.parent
    found = documents(source)
    assert b"".join(found) == b"".join((library / file["name"]).read_bytes() for file in listed(source)["files"])
    assert max(map(len, found)) <= DOCUMENT_BYTES


def test_files_are_listed_pattern_by_pattern_none_twice(project):
    for name in ("b.txt", "a.txt", "deep/er/c.txt", "z.jsonl"):
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text(json.dumps({"text": name}))
    listing = listed(FilesSource(paths=("z.jsonl", "*.txt", "**/*.txt", "./a.txt")))
    assert [file["name"] for file in listing["files"]] == ["z.jsonl", "a.txt", "b.txt", "deep/er/c.txt"]
    assert listing["files"][0] == {"name": "z.jsonl", "bytes": 19, "sha256": sha256(project / "z.jsonl")}


def test_one_file_under_several_names_is_listed_once(project):
    (project / "a.txt").write_text("same")
    (project / "b.txt").symlink_to("a.txt")
    (project / "c.txt").hardlink_to(project / "a.txt")
    other = f"../{project.name}/a.txt"
    listing = listed(FilesSource(paths=("*.txt", other)))
    assert [file["name"] for file in listing["files"]] == ["a.txt"]
    assert listing["skipped"] == dict.fromkeys(["b.txt", "c.txt", other], "the same file as a.txt")


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("none/*.txt", r"data\.source\.paths: none/\*\.txt matches no file \(relative paths start at "),
        ("folder", r"folder is a folder; name its files, such as folder/\*\*/\*\.txt"),
        ("*.csv", r"a\.csv: unsupported ending"),
    ],
)
def test_paths_that_name_no_text_are_errors(project, pattern, message):
    (project / "folder").mkdir()
    (project / "a.csv").write_text("a,b")
    with pytest.raises(DataError, match=message):
        listed(FilesSource(paths=(pattern,)))


def test_a_literal_path_may_hold_glob_characters(project):
    (project / "a[1].txt").write_text("text")
    assert documents(FilesSource(paths=("a[1].txt",))) == [b"text"]


def test_bytes_that_are_no_utf8_pass_through(project):
    (project / "a.txt").write_bytes(bytes(range(1, 256)) * 3)
    assert b"".join(documents(FilesSource(paths=("a.txt",), document_bytes=50))) == bytes(range(1, 256)) * 3


def test_max_bytes_ends_the_documents_before_it_is_exceeded(project):
    write_texts(project / "a.jsonl", ["x" * 10] * 9)
    assert len(documents(FilesSource(paths=("a.jsonl",), max_bytes=49))) == 4
    assert len(documents(FilesSource(paths=("a.jsonl",), max_bytes=50))) == 5
    assert len(documents(FilesSource(paths=("a.jsonl",)))) == 9


@pytest.mark.parametrize("change", ["content", "deletion"])
def test_a_file_that_changed_after_it_was_listed_is_named(project, change):
    for name in "ab":
        (project / f"{name}.txt").write_text(name)
    source = FilesSource(paths=("*.txt",))
    files = listed(source)["files"]
    if change == "content":
        (project / "b.txt").write_text("c")
    else:
        (project / "b.txt").unlink()
    found = read_documents(source, files, Account())
    assert next(found) == b"a"
    with pytest.raises(DataError, match=r"b\.txt: changed since it was listed .* run the stage `inputs` again"):
        next(found)


def test_hashes_of_files_are_remembered_until_the_file_changes(project, monkeypatch):
    hashed = []
    monkeypatch.setattr(sources, "sha256", lambda path: hashed.append(path.name) or sha256(path))
    for name in "ab":
        (project / f"{name}.txt").write_text(name)
    source = FilesSource(paths=("*.txt",))
    first = listed(source)
    assert listed(source) == first
    assert hashed == ["a.txt", "b.txt"]
    (project / "b.txt").write_text("c")
    assert listed(source)["files"][1]["sha256"] == sha256(project / "b.txt")
    assert hashed == ["a.txt", "b.txt", "b.txt"]


REVISION = "0123456789abcdef0123456789abcdef01234567"


def hub_folder(folder, rows):
    """A data set as `datasets` loads it from a path, without a network."""
    write_jsonl(folder / "train.jsonl", rows)
    return HuggingFaceSource(str(folder), REVISION, max_bytes=30)


def test_huggingface_is_listed_by_its_pinned_identity_alone():
    assert listed(HuggingFaceSource("nobody/nothing", REVISION, config="en")) == {
        "source": {
            "name": "nobody/nothing",
            "revision": REVISION,
            "kind": "huggingface",
            "config": "en",
            "split": "train",
            "text_column": "text",
            "max_bytes": 100_000_000,
        },
        "files": [],
        "skipped": {},
    }


def test_huggingface_streams_rows_up_to_the_cap(project):
    source = hub_folder(project / "hub", [{"id": i, "text": f"document {i} é"} for i in range(5)])
    assert documents(source) == ["document 0 é".encode(), "document 1 é".encode()]


def test_huggingface_errors_name_the_data_set_and_what_to_do(project, monkeypatch):
    source = hub_folder(project / "hub", [{"body": "b"}])
    with pytest.raises(DataError, match=rf"hub at revision {REVISION}, row 1: no column `text`, only body"):
        documents(source)
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"nothing at revision 0123\w+: cannot be read .* use a source of kind files or stdlib"):
        documents(HuggingFaceSource("nobody/nothing", REVISION))


def test_reading_is_lazy(project):
    (project / "a.jsonl").write_text('{"text": "good"}\nbad\n')
    source = FilesSource(paths=("a.jsonl",))
    assert next(read_documents(source, listed(source)["files"], Account())) == b"good"


@pytest.mark.parametrize("damaged", ["", "{", "[]", "caf\xe9"])
def test_damaged_memory_of_hashes_is_made_anew(project, damaged):
    (project / "a.txt").write_text("text")
    source = FilesSource(paths=("a.txt",))
    first = listed(source)
    memory = project / sources.REMEMBERED_HASHES
    memory.write_bytes(damaged.encode("latin-1"))
    assert listed(source) == first
    assert list(read_json(memory).values()) == [sha256(project / "a.txt")]


def test_a_file_that_is_not_what_its_name_says_is_refused_before_anything_is_read(project):
    (project / "a.txt").write_text("text")
    (project / "z.txt").write_bytes(gzip.compress(b"text"))
    with pytest.raises(DataError, match=r"z\.txt: its name says text, but its content is gzip"):
        listed(FilesSource(paths=("*.txt",)))
    assert not (project / "inputs.json").exists()


def test_all_messages_can_be_written_as_utf8(project):
    (project / "a.jsonl").write_text('{"\\ud800": "a"}')
    for source in (FilesSource(paths=("a.jsonl",)), FilesSource(paths=("\udc80*",)), FilesSource(paths=("\ud800{a,b}",))):
        with pytest.raises(DataError) as error:
            documents(source)
        str(error.value).encode()


def test_a_byte_order_mark_of_a_library_file_goes_as_everywhere(project, monkeypatch):
    library = project / "library"
    library.mkdir()
    (library / "a.py").write_bytes(b"\xef\xbb\xbfimport os\n")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(library))
    assert documents(StdlibSource()) == [b"import os\n"]


def test_pieces_concatenate_to_the_source_and_are_a_few_kilobytes():
    sizes = []
    for path in sorted(library().glob("*.py")):
        source = path.read_bytes()
        pieces = list(cut(source))
        assert b"".join(pieces) == source
        sizes += map(len, pieces)
        assert max(map(len, pieces)) <= max(DOCUMENT_BYTES, *(len(line) for line in source.splitlines(True)))
    assert 1500 < sum(sizes) / len(sizes) < DOCUMENT_BYTES


@pytest.mark.parametrize("seed", range(20))
def test_pieces_of_any_bytes_concatenate_to_them(seed):
    rng = random.Random(seed)
    code = [b"def f(): pass\n", b"\n", b"class A:\n", b"    def g(self): pass\n", b"@x\n", b"# y\n"]
    parts = [*code, b"\r\n", b"z" * 5_000, bytes(range(256))]
    source = b"".join(rng.choice(parts) for _ in range(rng.randrange(600)))
    assert b"".join(cut(source)) == source


def test_functions_and_classes_stay_whole_with_their_comments_and_decorators():
    blocks = [b"import os\n\n\n"]
    for i in range(60):
        body = b"    x = 1\n" * 40
        blocks.append(b"# What f%d does.\n@cached\nasync def f%d():\n%s\n\n" % (i, i, body))
    pieces = list(cut(b"".join(blocks)))
    assert b"".join(pieces) == b"".join(blocks)
    assert all(piece.startswith(b"# What f") for piece in pieces[1:])


def test_a_long_class_is_cut_at_its_methods():
    methods = [b"    @property\n    def m%d(self):\n%s\n" % (i, b"        y = 2\n" * 50) for i in range(20)]
    pieces = list(cut(b"class A:\n" + b"".join(methods)))
    assert len(pieces) > 3
    assert all(piece.startswith(b"    @property\n") for piece in pieces[1:])


def test_pieces_after_a_change_are_the_same_again():
    source = (library() / "argparse.py").read_bytes()
    before, after = set(cut(source)), set(cut(b"# A header of some lines.\n" * 30 + source))
    assert len(before & after) > 0.8 * len(before)


def test_tables_are_told_from_code_by_their_content():
    tables = ["pydoc_data/topics.py", "html/entities.py", "stringprep.py", "token.py", "keyword.py", "encodings/cp1252.py"]
    code = ["argparse.py", "typing.py", "json/decoder.py", "opcode.py", "ast.py"]
    code += ["encodings/idna.py", "dbm/gnu.py", "__future__.py"]
    assert [name for name in tables + code if is_table((library() / name).read_bytes())] == tables
    assert not is_table(b"")
