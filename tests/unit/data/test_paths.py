"""The files that match paths and patterns."""

import os
import re
import tempfile
from pathlib import Path

import pytest

from stacklm.data import DataError
from stacklm.data.sources import find_files

pytestmark = pytest.mark.usefixtures("project")


def make(*names):
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(name)


def found(*patterns):
    return [path.as_posix() for path in find_files(patterns)[0]]


def refused(*patterns):
    with pytest.raises(DataError) as error:
        find_files(patterns)
    return str(error.value)


def test_patterns_match_as_in_a_shell():
    make("a.txt", "b1.txt", "b2.md", "x/c.txt", "x/y/d.txt", "x/y/z/e.txt", "[odd].txt")
    assert found("*.txt") == ["[odd].txt", "a.txt", "b1.txt"]
    assert found("b?.*") == ["b1.txt", "b2.md"]
    assert found("[ab]*.txt", "x/*") == ["a.txt", "b1.txt", "x/c.txt"]
    assert found("[!ab]*.txt") == ["[odd].txt"]
    assert found("[[]odd].txt") == ["[odd].txt"]
    assert found("**/*.txt") == found("./**/**/*.txt") == ["[odd].txt", "a.txt", "b1.txt", "x/c.txt", "x/y/d.txt", "x/y/z/e.txt"]
    assert found("x/**") == found("x/**/*") == ["x/c.txt", "x/y/d.txt", "x/y/z/e.txt"]
    assert found("**/y/**/*.txt") == ["x/y/d.txt", "x/y/z/e.txt"]
    assert found("x/*/../c.txt") == ["x/y/../c.txt"]
    assert found(f"{Path.cwd()}/x/*.txt") == [f"{Path.cwd()}/x/c.txt"]


def test_braces_and_the_home_folder_are_expanded(monkeypatch):
    make("a/1.txt", "b/1.txt", "b/2.md", "{c,d}.txt", "{e}.txt")
    monkeypatch.setenv("HOME", str(Path.cwd() / "a"))
    assert found("{a,b}/1.txt") == ["a/1.txt", "b/1.txt"]
    assert found("{a/1,b/{1,2}}.*") == ["a/1.txt", "b/1.txt", "b/2.md"]
    assert found("{c,d}.txt", "{e}.txt") == ["{c,d}.txt", "{e}.txt"]
    assert found("~/*.txt") == [f"{Path.cwd()}/a/1.txt"]
    assert "b/3.* matches no file" in refused("b/{1,3}.*")
    assert "no home folder is known for ~nobody-has-this-name" in refused("~nobody-has-this-name/*.txt")
    for pattern in ("$HOME/*.txt", "{1..3}.txt"):
        assert f"{pattern} matches no file" in refused(pattern)
        assert "only ~, {a,b}, *, ?, [...] and ** are expanded" in refused(pattern)


def test_loops_of_links_end_and_each_file_is_read_once_under_its_real_name():
    make("data/a.txt", "data/deep/er/b.txt", "other/c.txt")
    links = {"data/up": "..", "data/up2": "..", "data/deep/self": ".", "data/0": "deep", "data/out": "../other"}
    for link, target in links.items():
        Path(link).symlink_to(target)
    files, skipped = find_files(["data/**/*.txt"])
    assert [path.as_posix() for path in files] == ["data/a.txt", "data/deep/er/b.txt", "data/out/c.txt"]
    assert skipped["data/0"] == skipped["data/deep/self"] == "link to a folder that is read already"
    assert found("**/**/*.txt") == ["data/a.txt", "data/deep/er/b.txt", "other/c.txt"]


def test_folders_that_all_link_to_each_other_are_walked_once():
    names = [f"f{i:02}" for i in range(14)]
    make(*(f"{name}/a.txt" for name in names))
    for name in names:
        for other in names:
            Path(name, f"to-{other}").symlink_to(f"../{other}")
    assert found("**/*.txt") == [f"{name}/a.txt" for name in names]


def test_what_matches_and_is_not_read_is_named_with_the_reason():
    make("a.txt", ".hidden.txt", ".git/b.txt", "folder.txt/c.md")
    Path("dangling.txt").symlink_to("nowhere")
    Path("loop.txt").symlink_to("loop.txt")
    Path("empty.txt").touch()
    os.mkfifo("pipe.txt")
    Path("link.txt").symlink_to("a.txt")
    files, skipped = find_files(["*.txt"])
    assert files == [Path("a.txt")]
    assert skipped == {
        ".hidden.txt": "hidden",
        "dangling.txt": "dangling link",
        "loop.txt": "dangling link",
        "empty.txt": "zero bytes",
        "pipe.txt": "not a regular file",
        "folder.txt": "folder",
        "link.txt": "the same file as a.txt",
    }
    assert find_files(["**/a*", ".hid*"]) == ([Path("a.txt"), Path(".hidden.txt")], {".git": "hidden"})


@pytest.mark.parametrize(
    ("name", "reason"),
    [("dangling.txt", "dangling link"), ("empty.txt", "zero bytes"), ("pipe.txt", "not a regular file")],
)
def test_a_path_that_cannot_be_read_is_an_error_with_the_reason(name, reason):
    Path("dangling.txt").symlink_to("nowhere")
    Path("empty.txt").touch()
    os.mkfifo("pipe.txt")
    for pattern in (name, name[:4] + "*"):
        assert f"{pattern} matches no file that can be read, 1 skipped: {reason} ({name})" in refused(pattern)


def test_a_name_that_is_not_utf8_is_an_error_that_shows_it():
    try:
        os.mkdir(b"caf\xe9")
        Path(os.fsdecode(b"caf\xe9/a.txt")).write_text("text")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    text = refused("**/*.txt")
    assert text == r"caf\xe9/a.txt: its name is not UTF-8; rename it"


@pytest.mark.parametrize("pattern", ["a\0b.txt", "x" * 300, "\ud800.txt", "x" * 300 + "*/a", "a\0*"])
def test_paths_that_no_file_can_have_are_errors(pattern):
    assert refused(pattern).startswith("data.source.paths: ")


def test_a_folder_without_permission_is_an_error_that_names_it(monkeypatch):
    user = os.geteuid()
    with tempfile.TemporaryDirectory() as root:
        os.chmod(root, 0o755)
        monkeypatch.chdir(root)
        make("open/a.txt", "shut/b.txt")
        os.chmod("shut", 0)
        try:
            if user == 0:
                os.seteuid(65534)  # the system's superuser may read everything
            for pattern in ("**/*.txt", "shut/*.txt", "shut/b.txt", "*/b.txt"):
                assert re.search(r"shut.*: Permission denied", refused(pattern)), pattern
        finally:
            os.seteuid(user)
            os.chmod("shut", 0o755)
