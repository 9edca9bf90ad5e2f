"""Where text comes from: the standard library, local files, or a data set of the Hugging Face hub."""

from __future__ import annotations

import glob
import itertools
import os
import platform
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

from tqdm import tqdm

from stacklm.config.data import Data, FilesSource, HuggingFaceSource, StdlibSource
from stacklm.config.schema import plain
from stacklm.data import DataError
from stacklm.data.formats import read_file, reader_of, text_of
from stacklm.files import read_json, sha256, write_json

Source = StdlibSource | FilesSource | HuggingFaceSource

REMEMBERED_HASHES = Path(".stacklm/hashes.json")
NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
"""Folders below the standard library that hold other people's code, tests or no source text."""


def list_inputs(config: Data, inputs: Path) -> None:
    """Stage `inputs`: write the source's identity, and each local file's name, size and SHA-256, as JSON to `inputs`.

    Raises `DataError` where a path matches nothing or a file is of no known kind.
    """
    source = config.source
    listing: dict = {"source": plain(source)}
    if isinstance(source, StdlibSource):
        listing["python"] = platform.python_version()
        listing["files"] = [_entry(path, path.relative_to(_library()).as_posix(), sha256(path)) for path in _stdlib_files(source)]
    elif isinstance(source, FilesSource):
        paths = _matches(source)
        listing["files"] = [_entry(path, path.as_posix(), digest) for path, digest in zip(paths, _hashes(paths), strict=True)]
    else:
        listing["files"] = []  # the pinned revision is all there is to say without asking the hub
    write_json(inputs, listing)
    size = sum(file["bytes"] for file in listing["files"])
    print(f"inputs: {source.kind}, {len(listing['files']):,} files, {size:,} bytes")


def read_documents(source: Source, files: list[dict]) -> Iterator[bytes]:
    """Yield the documents of `files` (of `inputs.json`) or of the hub's data set, ending before `max_bytes` is exceeded.

    Raises `DataError` naming the file if one changed since it was listed.
    """
    match source:
        case StdlibSource():
            documents = (_unchanged(_library() / file["name"], file).read_bytes() for file in files)
        case FilesSource():
            paths = (_unchanged(Path(file["name"]), file) for file in files)
            documents = (text for path in paths for text in read_file(path, source.text_column, source.document_bytes))
        case HuggingFaceSource():
            documents = _read_hub(source)
    return documents if source.max_bytes is None else _capped(documents, source.max_bytes)


def _capped(documents: Iterable[bytes], most: int) -> Iterator[bytes]:
    for document in documents:
        most -= len(document)
        if most < 0:
            return
        yield document


def _library() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _stdlib_files(source: StdlibSource) -> list[Path]:
    """The library's source files by name, as many as fit into `max_bytes`. The build's own settings are left out."""
    found = []
    for folder, folders, names in os.walk(_library()):
        folders[:] = [name for name in folders if name not in NOT_LIBRARY]
        found += [Path(folder, name) for name in names if name.endswith(".py") and not name.startswith("_sysconfigdata")]
    found.sort(key=lambda path: path.relative_to(_library()).as_posix())
    sizes = itertools.accumulate(path.stat().st_size for path in found)
    return [path for path, size in zip(found, sizes, strict=True) if size <= source.max_bytes]


def _matches(source: FilesSource) -> list[Path]:
    """The files that `paths` name: pattern by pattern, each in the order of names, none twice."""
    found: dict[Path, None] = {}
    for pattern in source.paths:
        named = Path(pattern)
        if named.is_dir():
            raise DataError(f"data.source.paths: {pattern} is a folder; name its files, such as {named.as_posix()}/**/*.txt")
        paths = [named] if named.is_file() else sorted(map(Path, glob.glob(pattern, recursive=True)))
        paths = [path for path in paths if path.is_file()]
        if not paths:
            raise DataError(f"data.source.paths: {pattern} matches no file (relative paths start at {Path.cwd()})")
        for path in paths:
            reader_of(path)
            found[path] = None
    return list(found)


def _hashes(paths: list[Path]) -> list[str]:
    """The SHA-256 of each file, remembered between runs for files whose size and times are what they were."""
    known = read_json(REMEMBERED_HASHES) if REMEMBERED_HASHES.exists() else {}
    facts = [(path.resolve(), path.stat()) for path in paths]
    keys = [f"{path}|{stat.st_size}|{stat.st_mtime_ns}|{stat.st_ctime_ns}" for path, stat in facts]
    pairs = tqdm(zip(keys, paths, strict=True), desc="inputs", total=len(paths), unit="file", mininterval=0.5, delay=1)
    hashes = {key: known.get(key) or sha256(path) for key, path in pairs}
    if hashes != known:
        write_json(REMEMBERED_HASHES, hashes)
    return [hashes[key] for key in keys]


def _entry(path: Path, name: str, digest: str) -> dict:
    return {"name": name, "bytes": path.stat().st_size, "sha256": digest}


def _unchanged(path: Path, file: dict) -> Path:
    digest = sha256(path) if path.is_file() else "no file"
    if digest != file["sha256"]:
        raise DataError(f"{path}: changed since it was listed (then {file['sha256']}, now {digest}); run the stage `inputs` again")
    return path


def _read_hub(source: HuggingFaceSource) -> Iterator[bytes]:
    import datasets  # late: it takes a second to import

    place = f"data set {source.name} at revision {source.revision}"
    try:
        rows = datasets.load_dataset(source.name, source.config, split=source.split, streaming=True, revision=source.revision)
        for number, row in enumerate(rows, 1):
            yield text_of(row, source.text_column, f"{place}, row {number}")
    except DataError:
        raise
    except Exception as error:  # many kinds, of several network libraries
        raise DataError(
            f"{place}: cannot be read ({type(error).__name__}: {error}). Check data.source, and that this machine reaches the hub; "
            "without a network, use a source of kind files or stdlib"
        ) from error
