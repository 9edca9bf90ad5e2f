"""Text sources: the standard library, local files, or a dataset of the Hugging Face hub.

The stage `inputs` lists a source's files and `read_documents` reads them. Below: the default corpus, which is the standard
library of the running interpreter without generated tables, cut into documents; and the files that `data.source.paths`
names: paths, `~`, `{a,b}`, and globs with `*`, `?`, `[...]` and `**`.
"""

from __future__ import annotations

import contextlib
import fnmatch
import os
import platform
import re
import stat
import sysconfig
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import accumulate, pairwise
from pathlib import Path

import pyarrow as pa

from stacklm.config.data import Data, FilesSource, HuggingFaceSource, StdlibSource
from stacklm.config.schema import plain
from stacklm.data import DataError
from stacklm.data.formats import Account, endings, opened, read_file, shown, skipped_files, text_of
from stacklm.files import read_json, sha256, write_json
from stacklm.progress import progress

Source = StdlibSource | FilesSource | HuggingFaceSource

REMEMBERED_HASHES = Path(".stacklm/hashes.json")


def list_inputs(config: Data, inputs: Path) -> None:
    """Stage `inputs`: write the source's identity, and each local file's name, size and SHA-256, as JSON to `inputs`.

    Skipped files are listed with the reason. Raises `DataError` if a path matches nothing, or if a file has an unknown format,
    does not match its name, or cannot be read.
    """
    source = config.source
    listing: dict = {"source": plain(source)}
    skipped: dict[str, str] = {}
    if isinstance(source, StdlibSource):
        listing["python"] = platform.python_version()
        paths, skipped = library_files(source.max_bytes)
        listing["files"] = [_entry(path, path.relative_to(library()).as_posix(), sha256(path)) for path in paths]
    elif isinstance(source, FilesSource):
        paths, skipped = find_files(source.paths)
        listing["files"] = [_entry(path, path.as_posix(), digest) for path, digest in zip(paths, _hashes(paths), strict=True)]
    else:
        listing["files"] = []  # without a request to the hub, only the pinned revision is known
    listing["skipped"] = skipped
    write_json(inputs, listing)
    size = sum(file["bytes"] for file in listing["files"])
    print(f"inputs: {source.kind}, {len(listing['files']):,} files, {size:,} bytes; {skipped_files(skipped)}")


def read_documents(source: Source, files: list[dict], account: Account) -> Iterator[bytes]:
    """Yield the documents of `files` (from `inputs.json`) or of the hub's dataset, stopping before `max_bytes` is exceeded.

    Empty documents are left out; everything read is counted in `account`. Raises `DataError` naming a file that changed since it
    was listed.
    """
    match source:
        case StdlibSource():
            documents = (
                text for path in _unchanged(library(), files, account) for text in cut(account.without_mark(path.read_bytes()))
            )
        case FilesSource():
            paths = _unchanged(Path(), files, account)
            documents = (text for path in paths for text in read_file(path, source.text_column, source.document_bytes, account))
        case HuggingFaceSource():
            documents = _read_hub(source, account)
    left = source.max_bytes
    for document in documents:
        account.document(document)
        if left is not None and len(document) > left:
            account.over_max_bytes = 1
            account.files_not_read = len(files) - account.files
            return
        if left is not None:
            left -= len(document)
        if document:
            yield document


def _hashes(paths: list[Path]) -> list[str]:
    """The SHA-256 of each file, cached between runs for files with unchanged size and times.

    Raises `DataError` if a file cannot be read, or if one that is not cached does not match its name.
    """
    known = _remembered()
    hashes: dict[str, str] = {}
    keys = []
    for path in progress(paths, desc="inputs", unit="file", delay=1):
        with _naming(path):
            stat = path.stat()
            keys.append(f"{shown(path.resolve())}|{stat.st_size}|{stat.st_mtime_ns}|{stat.st_ctime_ns}")
            if keys[-1] not in known:
                with opened(path, Account()):
                    known[keys[-1]] = sha256(path)
        hashes[keys[-1]] = known[keys[-1]]
    if hashes != _remembered():
        write_json(REMEMBERED_HASHES, hashes)
    return [hashes[key] for key in keys]


def _remembered() -> dict[str, str]:
    """The cached hashes of earlier runs; empty if the cache file is absent or damaged."""
    try:
        known = read_json(REMEMBERED_HASHES)
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turn an error of the file system or of decompression into a `DataError` that names the file."""
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{shown(path)}: cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _entry(path: Path, name: str, digest: str) -> dict:
    return {"name": name, "bytes": path.stat().st_size, "sha256": digest}


def _unchanged(folder: Path, files: list[dict], account: Account) -> Iterator[Path]:
    """Yield the path of each listed file after checking that it has not changed since it was listed."""
    for file in files:
        path = folder / file["name"]
        with _naming(path):
            digest = sha256(path) if path.is_file() else "no file"
        if digest != file["sha256"]:
            change = f"then {file['sha256']}, now {digest}"
            raise DataError(f"{shown(path)}: changed since it was listed ({change}); run the stage `inputs` again")
        account.files += 1
        yield path


def _read_hub(source: HuggingFaceSource, account: Account) -> Iterator[bytes]:
    import datasets  # imported late: it takes a second

    place = f"data set {source.name} at revision {source.revision}"
    try:
        rows = datasets.load_dataset(source.name, source.config, split=source.split, streaming=True, revision=source.revision)
        for number, row in enumerate(rows, 1):
            yield from account.row(text_of(row, source.text_column, f"{place}, row {number}"))
    except DataError:
        raise
    except Exception as error:  # many types, from several network libraries
        raise DataError(
            f"{place}: cannot be read ({type(error).__name__}: {error}). Check data.source, and that this machine reaches the hub; "
            "without a network, use a source of kind files or stdlib"
        ) from error


NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "__pycache__"}
"""Folders of third-party code, tests, code pages (tables, and one small module repeated many times) or no source text."""
DOCUMENT_BYTES = 3072
LITERAL = (b"'", b'"', b"(", b"[", b"{", b"b'", b'b"', b"-", *(b"%d" % digit for digit in range(10)))
"""Starts of lines that are a row of a table, or a piece of a long string."""
GENERATED = re.compile(rb"(?i)\bauto(?:-|matically )?generated\b")
CUTS = (
    re.compile(rb"(?m)^(?:[#@].*\n)*(?:async +)?(?:def|class)\b"),  # at definitions, with their comments and decorators
    re.compile(rb"(?m)^(?:(?:    |\t)[#@].*\n)*(?:    |\t)(?:async +)?(?:def|class)\b"),  # at those within one class
    re.compile(rb"(?m)(?<=^\n)(?=.)"),  # after blank lines
    re.compile(rb"(?m)^"),  # at lines
)
"""Positions at which a file may be cut, from coarse to fine."""


def library() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def library_files(max_bytes: int) -> tuple[list[Path], dict[str, str]]:
    """The library's source files by name, up to `max_bytes` in total, and the names of skipped files with the reason."""
    found = []
    for folder, folders, names in os.walk(library()):
        folders[:] = [name for name in folders if name not in NOT_LIBRARY]
        found += [Path(folder, name) for name in names if name.endswith(".py") and not name.startswith("_sysconfigdata")]
    found.sort(key=lambda path: path.relative_to(library()).as_posix())
    skipped = {path: "generated table" for path in found if is_table(path.read_bytes())}
    kept = [path for path in found if path not in skipped]
    ends = accumulate(path.stat().st_size for path in kept)
    skipped |= {path: "beyond data.source.max_bytes" for path, end in zip(kept, ends, strict=True) if end > max_bytes}
    return [path for path in kept if path not in skipped], {
        path.relative_to(library()).as_posix(): why for path, why in skipped.items()
    }


def is_table(source: bytes) -> bool:
    """Whether a source file is data, not code: it is marked as generated, or more than half of it is lines of literals."""
    lines = (line.lstrip() for line in source.splitlines())
    literal = sum(len(line) for line in lines if line.startswith(LITERAL) and not line.startswith((b"'''", b'"""')))
    return bool(GENERATED.search(source[:1024])) or 2 * literal > len(source)


def cut(text: bytes, cuts: tuple[re.Pattern[bytes], ...] = CUTS) -> Iterator[bytes]:
    """Cut a source file into documents of at most `DOCUMENT_BYTES`, if its lines are not longer; they concatenate to the file.

    Neighbouring pieces are joined while they fit. A piece that is too long starts a new document and is cut at the next finer
    positions, so that a change in a file affects only the documents near it.
    """
    if len(text) <= DOCUMENT_BYTES or not cuts:
        yield text
        return
    places = sorted({0, *(match.start() for match in cuts[0].finditer(text)), len(text)})
    document = b""
    for start, stop in pairwise(places):
        if document and len(document) + stop - start > DOCUMENT_BYTES:
            yield from cut(document, cuts[1:])
            document = b""
        document += text[start:stop]
    yield from cut(document, cuts[1:])


BRACES = re.compile(r"\{([^{}]*,[^{}]*)\}")
GLOB = re.compile(r"[*?[]")


def find_files(patterns: Iterable[str]) -> tuple[list[Path], dict[str, str]]:
    """The files that match the patterns, by pattern and then by name, each file once.

    Also the names that were skipped, with the reason: dangling links, files that are not regular, empty files, other names of a
    file or folder that was already read, and hidden files and folders, which `*` and `**` do not match. A path that exists is
    taken literally, whatever its characters. Raises `DataError` if a pattern, or one of its `{a,b}` alternatives, matches no
    readable file, names a folder or a file with an unknown extension, or if a folder cannot be listed.
    """
    found: dict[tuple[int, int], Path] = {}
    skipped: dict[str, str] = {}
    for pattern in patterns:
        try:
            for alternative in _alternatives(pattern):
                _find(alternative, found, skipped)
        except DataError:
            raise
        except (OSError, ValueError) as error:  # no permission, a name that is too long or contains NUL
            where = shown(getattr(error, "filename", None) or pattern)
            raise DataError(f"data.source.paths: {where}: {getattr(error, 'strerror', None) or error}") from error
    return list(found.values()), skipped


def _alternatives(pattern: str) -> Iterator[str]:
    """The pattern with `~` and `{a,b}` expanded."""
    braces = None if os.path.lexists(pattern) else BRACES.search(pattern)
    if braces:
        for choice in braces[1].split(","):
            yield from _alternatives(pattern[: braces.start()] + choice + pattern[braces.end() :])
        return
    expanded = pattern if os.path.lexists(pattern) else os.path.expanduser(pattern)
    if pattern.startswith("~") and expanded == pattern and not os.path.lexists(pattern):
        user = shown(Path(pattern).parts[0])
        raise DataError(f"data.source.paths: {shown(pattern)}: no home folder is known for {user}; write the whole path")
    yield expanded


def _find(pattern: str, found: dict[tuple[int, int], Path], skipped: dict[str, str]) -> None:
    """Add the files that match one pattern to `found`, by device and inode, and its other matches to `skipped`."""
    named = Path(pattern)
    if named.is_dir():
        raise DataError(
            f"data.source.paths: {shown(pattern)} is a folder; name its files, such as {shown(named.as_posix())}/**/*.txt"
        )
    known = dict(skipped)
    matches = {named} if os.path.lexists(named) else set(_walk(named, skipped))
    readable = False
    for path in sorted(matches):
        why, identity = _state(path)
        if why == "folder" and "**" in named.parts[-2:]:
            continue  # its files are matched themselves
        first = found.get(identity)
        readable |= not why
        if not why and first is None:
            found[identity] = path
        elif path != first:
            skipped[shown(path)] = why or f"the same file as {first}"
    if not readable:
        new = {name: why for name, why in skipped.items() if name not in known}
        hint = "; only ~, {a,b}, *, ?, [...] and ** are expanded" if re.search(r"[{}$~]", pattern) else ""
        told = f"matches no file that can be read, {skipped_files(new)}" if new else "matches no file"
        raise DataError(f"data.source.paths: {shown(pattern)} {told} (relative paths start at {shown(Path.cwd())}){hint}")


def _state(path: Path) -> tuple[str, tuple[int, int]]:
    """Why a path cannot be read ('' if it can), and its device and inode. Raises `DataError` for a file of unknown format."""
    try:
        status = path.stat()
    except OSError as error:
        if isinstance(error, PermissionError) or not path.is_symlink():
            raise
        return "dangling link", (0, 0)
    identity = status.st_dev, status.st_ino
    if stat.S_ISDIR(status.st_mode):
        return "folder", identity
    if not stat.S_ISREG(status.st_mode):
        return "not a regular file", identity
    endings(path)
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise DataError(f"{shown(path)}: its name is not UTF-8; rename it") from None
    return ("" if status.st_size else "zero bytes"), identity


def _walk(pattern: Path, skipped: dict[str, str]) -> Iterator[Path]:
    """Yield the paths that match the pattern, possibly twice. Links to folders are followed last, and each folder only once.

    So loops of links terminate, and a file that is also reachable without a link is listed under its real path.
    """
    parts = tuple(part for part, following in pairwise([*pattern.parts, ""]) if not part == following == "**")
    parts += ("*",) if parts[-1] == "**" else ()
    fixed = next((i for i, part in enumerate(parts) if GLOB.search(part)), len(parts))
    real, linked = deque([(Path(*parts[:fixed]), parts[fixed:])]), deque()
    walked = set()
    while real or linked:
        path, rest = (real or linked).popleft()
        if not rest and os.path.lexists(path):
            yield path
        if not rest or not path.is_dir():
            continue
        status = path.stat()
        state = (status.st_dev, status.st_ino, rest)
        if state in walked:
            if path.is_symlink():
                skipped[shown(path)] = "link to a folder that is read already"
            continue
        walked.add(state)
        for step in _steps(path, rest, skipped):
            (linked if step[0].is_symlink() else real).append(step)


def _steps(folder: Path, rest: tuple[str, ...], skipped: dict[str, str]) -> Iterator[tuple[Path, tuple[str, ...]]]:
    """The entries of a folder that match the first part of a pattern, each with the remaining parts of the pattern."""
    part, after = rest[0], rest[1:]
    if part == "**":
        yield folder, after
    elif not GLOB.search(part):
        with contextlib.suppress(FileNotFoundError):
            (folder / part).lstat()
            yield folder / part, after
        return
    for name in sorted(os.listdir(folder)):
        path = folder / name
        if not (path.is_dir() if part == "**" else fnmatch.fnmatch(name, part)):
            continue
        if name.startswith(".") and not part.startswith("."):
            skipped[shown(path)] = "hidden"
        else:
            yield path, rest if part == "**" else after
