"""Benchmark files as items to score: BLiMP, LAMBADA, WikiText and any multiple-choice questions, formatted as in lm-eval."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stacklm.config.evaluate import Benchmark
from stacklm.config.schema import shown
from stacklm.data import DataError
from stacklm.data.formats import TEXTS, Account, endings, json_rows, opened, read_file
from stacklm.files import read_json, sha256, write_json


@dataclass(frozen=True)
class Item:
    """A context and its possible continuations, of which the one with index `answer` is correct.

    `group` is the BLiMP set of a pair; `words` and `bytes` are the size of a WikiText article before it was detokenized.
    """

    context: str
    continuations: tuple[str, ...]
    answer: int = 0
    group: str = ""
    words: int = 0
    bytes: int = 0


def list_benchmarks(benchmarks: Sequence[Benchmark], listing: Path) -> None:
    """Read every file once; write its size, SHA-256 and number of items as JSON to `listing`. Raises what `read_items` raises."""
    found = {}
    for benchmark in benchmarks:
        items, file = read_items(benchmark), file_of(benchmark)
        found[benchmark.title] = {"path": benchmark.path, "bytes": file.stat().st_size, "sha256": sha256(file), "items": len(items)}
    write_json(listing, found)


def read_listed(benchmark: Benchmark, listing: Path) -> list[Item]:
    """The items of a listed benchmark (`read_items`). Raises `DataError` if its file has changed since it was listed."""
    if not file_of(benchmark).is_file() or sha256(file_of(benchmark)) != read_json(listing)[benchmark.title]["sha256"]:
        raise DataError(f"{benchmark.path}: changed since it was listed; run the stage `inputs` again")
    return read_items(benchmark)


def file_of(benchmark: Benchmark) -> Path:
    return Path(benchmark.path).expanduser()


def read_items(benchmark: Benchmark) -> list[Item]:
    """The items of a benchmark in the order of its file, up to its `limit`.

    Raises `DataError` naming the file, and the line and key if there is one, if it is missing, empty or malformed.
    """
    file = file_of(benchmark)
    if not file.is_file():
        raise DataError(f"{file}: no such file (benchmark {benchmark.title}; relative paths start at {Path.cwd()})")
    items = list(_limited(_articles(file) if benchmark.kind == "wikitext" else _rows(file, benchmark), benchmark.limit))
    if not items:
        raise DataError(f"{file}: holds no item (benchmark {benchmark.title})")
    return items


def _limited(items: Iterator[Item], limit: int | None) -> Iterator[Item]:
    seen: Counter[str] = Counter()
    for item in items:
        seen[item.group] += 1
        if limit is None or seen[item.group] <= limit:
            yield item


def _rows(file: Path, benchmark: Benchmark) -> Iterator[Item]:
    if endings(file)[0] != ".jsonl":
        raise DataError(f"{file}: a benchmark of kind {benchmark.kind} is a .jsonl file, also as .gz or .zst")
    with opened(file, account := Account()) as content:
        for place, row in json_rows(content, str(file), account):
            match benchmark.kind:
                case "blimp":
                    pair = _text(row, "sentence_good", place), _text(row, "sentence_bad", place)
                    yield Item("", tuple(f" {sentence}" for sentence in pair), group=_text(row, "UID", place))
                case "lambada":
                    context, space, last = _text(row, "text", place).rpartition(" ")
                    if not last or not space:
                        raise DataError(f"{place}: key `text`: expected words, with one space before the last and none after it")
                    yield Item(context, (f" {last}",))
                case _:
                    yield _question(row, benchmark, place)


def _question(row: Mapping[str, Any], benchmark: Benchmark, place: str) -> Item:
    choices, answer = (_value(row, key, place) for key in (benchmark.choices_key, benchmark.answer_key))
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(one, str) and one for one in choices):
        raise DataError(f"{place}: key `{benchmark.choices_key}`: expected a list of two texts or more, got {shown(choices)}")
    if isinstance(answer, str):
        answer = choices.index(answer) if answer in choices else int(answer) if re.fullmatch("[0-9]{1,9}", answer) else None
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        wanted = f"expected one of the choices or its place, 0 to {len(choices) - 1}, got {shown(row[benchmark.answer_key])}"
        raise DataError(f"{place}: key `{benchmark.answer_key}`: {wanted}")
    return Item(_text(row, benchmark.context_key, place), tuple(f" {choice}" for choice in choices), answer)


def _value(row: Mapping[str, Any], key: str, place: str) -> Any:
    if key not in row:
        raise DataError(f"{place}: no key `{key}`, only {', '.join(row) or 'none'}")
    return row[key]


def _text(row: Mapping[str, Any], key: str, place: str) -> str:
    text = _value(row, key, place)
    if not isinstance(text, str) or not text:
        raise DataError(f"{place}: key `{key}`: expected a text, got {shown(text)}")
    return text


def _articles(file: Path) -> Iterator[Item]:
    """The articles of WikiText's own file, which start with a heading `= ... =`, or each `page` of a .jsonl or .parquet."""
    for document in read_file(file, "page", 0, Account()):
        text = document.decode("utf-8", "replace")
        if endings(file)[0] in TEXTS:
            lines: list[str] = []
            for line in text.split("\n"):
                if re.fullmatch(r"= .* =", line.replace("= = =", "===").replace("= =", "==").strip()):
                    yield from _article("\n".join(lines))
                    lines = []
                lines.append(line)
            text = "\n".join(lines)
        yield from _article(text)


def _article(text: str) -> Iterator[Item]:
    if text.strip():
        yield Item("", (detokenize(text),), words=len(re.split(r"\s+", text)), bytes=len(text.encode()))


DETOKENIZE = [
    ("s '", "s'"),
    *((f" @{mark}@ ", mark) for mark in "-,."),
    *((f" {mark} ", f"{mark} ") for mark in ":;.!?,"),
    (re.compile(r"\(\s*([^\)]*?)\s*\)"), r"(\1)"),
    (re.compile(r"\[\s*([^\]]*?)\s*\]"), r"[\1]"),
    (re.compile(r"\{\s*([^}]*?)\s*\}"), r"{\1}"),
    (re.compile(r'"\s*([^"]*?)\s*"'), r'"\1"'),
    (re.compile(r"'\s*([^']*?)\s*'"), r"'\1'"),
    ("= = = =", "===="),
    ("= = =", "==="),
    ("= =", "=="),
    (" ° ", "°"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
]
"""Replacements, applied in order, with which lm-eval's task `wikitext` undoes WikiText's tokenization."""


def detokenize(text: str) -> str:
    """Undo WikiText's tokenization."""
    for old, new in DETOKENIZE:
        text = text.replace(old, new) if isinstance(old, str) else old.sub(new, text)
    return text
