"""Section `data`: where the text comes from and how it is split."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from stacklm.config.schema import Count, Natural, ParamsError, Share


@dataclass(frozen=True)
class StdlibSource:
    """The source text of the running interpreter's standard library: real text on every machine."""

    kind: Literal["stdlib"] = "stdlib"
    max_bytes: Count = 8_000_000


@dataclass(frozen=True)
class FilesSource:
    """Local files: .txt, .md, .jsonl, .parquet, each also as .gz or .zst.

    `paths` are paths or globs (`**` allowed), relative to the project's root unless absolute.
    A .txt or .md file is cut at blank lines into documents of about `document_bytes` (0: one document a
    file, which takes about 120 bytes of memory for each of its bytes); a .jsonl line or a .parquet row is one
    document, its text in `text_column`.
    """

    paths: tuple[str, ...]
    kind: Literal["files"] = "files"
    text_column: str = "text"
    document_bytes: Natural = 16_384
    max_bytes: Count | None = None

    def __post_init__(self) -> None:
        if not self.paths:
            raise ParamsError("paths: [] is not allowed; name at least one path or glob")


@dataclass(frozen=True)
class HuggingFaceSource:
    """A data set of the Hugging Face hub, at a pinned revision (a commit, not a branch)."""

    name: str
    revision: str
    kind: Literal["huggingface"] = "huggingface"
    config: str | None = None
    split: str = "train"
    text_column: str = "text"
    max_bytes: Count = 100_000_000

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[0-9a-f]{40}", self.revision):
            raise ParamsError(
                f"revision: {self.revision!r} may change its content; pin a commit of the data set, 40 hexadecimal digits"
            )


@dataclass(frozen=True)
class Data:
    """`valid_fraction` and `test_fraction` are shares of the documents, chosen by a hash of their content."""

    source: StdlibSource | FilesSource | HuggingFaceSource
    valid_fraction: Share = 0.05
    test_fraction: Share = 0.05

    def __post_init__(self) -> None:
        if self.valid_fraction + self.test_fraction >= 1:
            raise ParamsError(
                f"valid_fraction {self.valid_fraction} + test_fraction {self.test_fraction} leave nothing to train on; "
                "their sum must be below 1"
            )
        for name in ("valid_fraction", "test_fraction"):
            if getattr(self, name) == 0:
                raise ParamsError(f"{name}: 0 is not allowed; every model is judged on unseen text, so it must be > 0")
