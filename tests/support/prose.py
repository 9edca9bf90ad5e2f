"""Commands, settings and links in Markdown files."""

from __future__ import annotations

import re
from pathlib import Path

from support import ROOT

PROGRAMS = [
    "dvc",
    "git",
    "make",
    "mkdocs",
    "pip",
    "pre-commit",
    "prefect",
    "pyright",
    "python",
    "python3",
    "ruff",
    "stacklm",
    "torchrun",
]
_CODE = re.compile(r"`([^`]+)`")
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\((?!\w+:)([^)\s#]*)(?:#([^)\s]+))?\)")


def pages() -> list[Path]:
    """Every page of the documentation."""
    found = [path for pattern in ("*.md", "docs/**/*.md", "examples/*.md") for path in ROOT.glob(pattern)]
    return sorted(path for path in found if path.name != "LOG.md")  # entries of the log show the commands of their day


def blocks(text: str, *languages: str) -> list[str]:
    """The contents of the fenced blocks in these languages."""
    return [body for language, body in _FENCE.findall(text) if language in languages]


def commands(text: str) -> list[str]:
    """Every command line in the shell blocks and between backticks: a known program with at least one argument."""
    lines = [line for body in blocks(text, "", "bash", "sh", "console") for line in body.replace("\\\n", " ").splitlines()]
    lines = [re.split(r"\s{2,}|\s#\s", line.strip())[0] for line in lines]  # explained after two spaces or a #
    lines += [re.sub(r"\s+", " ", code) for code in _CODE.findall(_FENCE.sub("", text))]
    parts = [part.strip() for line in lines for part in re.split(r"&&|;", line)]
    return list(dict.fromkeys(part for part in parts if part.split(" ")[0] in PROGRAMS and " " in part))


def links(text: str) -> list[tuple[str, str]]:
    """The relative links and images, as file (empty: the same page) and anchor (empty: none)."""
    return _LINK.findall(_FENCE.sub("", text))


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", _FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip()) for heading in headings}
