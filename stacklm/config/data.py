"""Section `data`: where the text comes from and how it is split."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from stacklm.config.schema import Count, Natural, ParamsError, Share


@dataclass(frozen=True)
class StdlibSource:
    """The source text of the running interpreter's standard library, without tests and generated tables.

    Files are split at definitions into documents of at most 3 kB.
    """

    kind: Literal["stdlib"] = "stdlib"
    max_bytes: Count = 8_000_000
    """Files are taken in order of name as long as they fit into that many bytes."""


@dataclass(frozen=True)
class FilesSource:
    """Local files: .txt, .md, .raw, .tokens, .jsonl, .parquet, each also as .gz or .zst.

    With `document_bytes: 0` a file needs about 120 bytes of memory per byte.
    """

    paths: tuple[str, ...]
    """Paths or globs (`*`, `?`, `[...]`, `**`, `{a,b}`, `~`), relative to the project's root unless absolute."""
    kind: Literal["files"] = "files"
    text_column: str = "text"
    """The text field of a .jsonl line or a .parquet row; each line or row is one document."""
    document_bytes: Natural = 16_384
    """Split .txt and .md files at blank lines into documents of about that many bytes; 0: one document per file."""
    max_bytes: Count | None = None
    """Maximum bytes of text to read; null: everything."""

    def __post_init__(self) -> None:
        if not all(self.paths) or not self.paths:
            raise ParamsError(f"paths: {list(self.paths)} is not allowed; name at least one path or glob, and none that is empty")


@dataclass(frozen=True)
class HuggingFaceSource:
    """A data set of the Hugging Face hub at a pinned revision (a commit, not a branch)."""

    name: str
    """The data set's name on the hub, such as `wikimedia/wikipedia`."""
    revision: str
    """The commit of the data set, 40 hexadecimal digits."""
    kind: Literal["huggingface"] = "huggingface"
    config: str | None = None
    """The data set's configuration, if it has several."""
    split: str = "train"
    """The data set's split."""
    text_column: str = "text"
    """The column of the text."""
    max_bytes: Count = 100_000_000
    """Maximum bytes of text to read."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[0-9a-f]{40}", self.revision):
            raise ParamsError(
                f"revision: {self.revision!r} may change its content; pin a commit of the data set, 40 hexadecimal digits"
            )


@dataclass(frozen=True)
class Data:
    """Where the text comes from and how it is split. Near-duplicates are kept in the same split."""

    source: StdlibSource | FilesSource | HuggingFaceSource
    """Where the text comes from."""
    valid_fraction: Share = 0.05
    """Share of the documents for validation, chosen by a hash of their content."""
    test_fraction: Share = 0.05
    """Share of the documents for the test set, chosen by a hash of their content."""

    def __post_init__(self) -> None:
        if self.valid_fraction + self.test_fraction >= 1:
            raise ParamsError(
                f"valid_fraction {self.valid_fraction} + test_fraction {self.test_fraction} leave nothing to train on; "
                "their sum must be below 1"
            )
        for name in ("valid_fraction", "test_fraction"):
            if getattr(self, name) == 0:
                raise ParamsError(f"{name}: 0 is not allowed; every model is judged on unseen text, so it must be > 0")
