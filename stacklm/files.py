"""Atomic file writes (temporary file, fsync, rename), content hashes, and locating the project."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any


def project_root(start: Path | None = None) -> Path | None:
    """The project that contains `start` (default: the current directory): the nearest folder upwards with a dvc.yaml, except
    one directly inside a project, such as `experiments`. None outside any project."""
    start = (start or Path.cwd()).resolve()
    folders = (start, *start.parents)
    return next((f for f in folders if (f / "dvc.yaml").is_file() and not (f.parent / "dvc.yaml").is_file()), None)


@contextlib.contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is synced and atomically replaces `path`.

    On an error, including a full disk, the temporary file is removed and `path` is unchanged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield aside
        sync(aside)
        os.replace(aside, path)
        sync(path.parent)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text with `\\n` line endings on every system, so that equal content has equal bytes."""
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: Path, value: Any) -> None:
    """Write JSON deterministically: keys in insertion order, floats in their shortest exact form."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write JSON lines, one per row. Raises `ValueError` for NaN or Inf."""
    write_text(path, "".join(map(json_line, rows)))


def json_line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, allow_nan=False) + "\n"


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def read_jsonl(path: Path) -> list[dict]:
    """The rows of a JSON-lines file; empty if it does not exist. A last line truncated by a kill is ignored."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


def sync(path: Path) -> None:
    """Flush a file or a directory to disk. Does nothing for directories on Windows, where they cannot be synced."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    """The SHA-256 of a file, or of the relative names and contents of a directory's files."""
    if path.is_dir():
        digest = hashlib.sha256()
        for file in sorted(p for p in path.rglob("*") if p.is_file()):
            digest.update(f"{file.relative_to(path).as_posix()}\0{sha256(file)}\n".encode())
        return digest.hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove(path: Path) -> None:
    """Remove a file or a directory tree, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def publish(source: Path, target: Path) -> None:
    """Copy `source` (a file or a directory) to `target` exactly: complete or absent, never edited in place."""
    aside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    target.parent.mkdir(parents=True, exist_ok=True)
    remove(aside)
    try:
        if source.is_dir():
            shutil.copytree(source, aside)
        else:
            shutil.copyfile(source, aside)
        for file in [aside, *aside.rglob("*")] if aside.is_dir() else [aside]:
            sync(file)
        remove(target)
        os.replace(aside, target)
        sync(target.parent)
    except BaseException:
        remove(aside)
        raise
