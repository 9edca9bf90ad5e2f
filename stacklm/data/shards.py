"""Reading token shards: each split is one long stream of token ids in a few large memory-mapped files.

A document's tokens are followed by the end token; documents are concatenated without padding. The folder holds
`manifest.json` and files `{split}-{number}.bin` of little-endian ids. If not all tokens are targets of the loss, it also holds
`targets.npz`, the loss mask, with a bool for every token of each split.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from tqdm import tqdm

from stacklm.config.schema import Count, Natural, ParamsError, Range, read
from stacklm.data import DataError
from stacklm.files import read_json, sha256
from stacklm.progress import progress

VERSION = 1
TARGETS = "targets.npz"
DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
READ_TOKENS = 1 << 22
AGAIN = "run the stage `shards` again"


class TokenStream:
    """The tokens of one split. `stream[a:b]` returns the ids a to b-1 as int64 [b-a], across file boundaries.

    `bytes` and `words` are the size of the text; words are separated by ASCII white space. `targets`, one bool per token, marks the
    targets of the loss; None: all tokens.
    """

    def __init__(
        self, files: list[np.ndarray], end_id: int, documents: int, bytes: int, words: int, targets: np.ndarray | None = None
    ) -> None:
        self.end_id, self.documents, self.bytes, self.words, self.targets = end_id, documents, bytes, words, targets
        self._files = files
        self._ends = list(accumulate(len(file) for file in files))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, window: slice) -> np.ndarray:
        start, stop, step = window.indices(len(self))
        if step != 1:
            raise ValueError(f"a token stream is read in order, not in steps of {step}")
        parts = [np.empty(0, np.int64)]
        while start < stop:
            i = bisect_right(self._ends, start)
            offset = self._ends[i] - len(self._files[i])
            end = min(stop, self._ends[i])
            parts.append(self._files[i][start - offset : end - offset].astype(np.int64))
            start = end
        return np.concatenate(parts)


@dataclass(frozen=True)
class _Shard:
    file: str
    tokens: Count
    sha256: str


@dataclass(frozen=True)
class _Split:
    tokens: Count
    documents: Natural
    bytes: Natural
    words: Natural
    shards: tuple[_Shard, ...]


@dataclass(frozen=True)
class _Manifest:
    """The contents of `manifest.json`. Raises `ParamsError` with the key if its values are inconsistent."""

    version: int
    dtype: Literal["uint16", "uint32"]
    vocab_size: Annotated[int, Range(1, 2**32)]
    end_id: Natural
    tokenizer: str
    token_bytes: tuple[Natural, ...]
    splits: dict[str, _Split]
    targets: str | None = None
    """SHA-256 of the loss-mask file; null if there is none."""

    def __post_init__(self) -> None:
        if len(self.token_bytes) != self.vocab_size:
            raise ParamsError(f"token_bytes for {len(self.token_bytes)} tokens, but a vocabulary of {self.vocab_size}")
        if self.end_id >= self.vocab_size:
            raise ParamsError(f"end_id: {self.end_id} is outside the vocabulary of {self.vocab_size}")
        for name, split in self.splits.items():
            if not name.isalnum():
                raise ParamsError(f"splits: {name!r} is not the name of a split")
            for i, shard in enumerate(split.shards):
                if shard.file != (wanted := file_name(name, i)):  # so that the file is in the folder
                    raise ParamsError(f"splits.{name}.shards[{i}].file: {shard.file!r} must be {wanted!r}")
            if split.tokens != (total := sum(shard.tokens for shard in split.shards)):
                raise ParamsError(f"splits.{name}.tokens: {split.tokens}, but its shards have {total}")


def file_name(split: str, number: int) -> str:
    """The name of a file of a split, in the folder of the manifest."""
    return f"{split}-{number:05d}.bin"


@dataclass(frozen=True, eq=False)
class Shards:
    """A folder of shards. `token_bytes` [V] is the length of each token's text in bytes, 0 for special tokens."""

    folder: Path
    vocab_size: int
    end_id: int
    tokenizer: str
    token_bytes: np.ndarray
    dtype: np.dtype
    splits: dict[str, dict]
    targets: str | None = None

    @classmethod
    def open(cls, folder: Path) -> Shards:
        """Read the manifest and check that every file exists and is complete, without reading tokens.

        Raises `DataError`, naming file and key, for a manifest that is damaged, of another version or inconsistent, and for a
        shard that is missing or of the wrong size.
        """
        manifest = _read_manifest(folder / "manifest.json")
        same = {name: manifest[name] for name in ("vocab_size", "end_id", "tokenizer", "splits")}
        sizes = np.array(manifest["token_bytes"], dtype=np.int64)
        shards = cls(folder=folder, token_bytes=sizes, dtype=DTYPES[manifest["dtype"]], targets=manifest.get("targets"), **same)
        for split in shards.splits.values():
            for shard in split["shards"]:
                shards._check_size(shard)
        return shards

    def split(self, name: str) -> TokenStream:
        """Check the hashes and ids of the split's files, reading each once, and map them into memory.

        Raises `DataError` naming a file that was damaged or modified.
        """
        if name not in self.splits:
            raise DataError(f"{self.folder}: no split {name!r}; the splits are {', '.join(self.splits)}")
        split = self.splits[name]
        files = [np.memmap(self.folder / shard["file"], dtype=self.dtype, mode="r").view(np.ndarray) for shard in split["shards"]]
        with progress(total=split["tokens"], desc=f"check {name}", unit="token", unit_scale=True, delay=1) as bar:
            for shard, tokens in zip(split["shards"], files, strict=True):
                self._check_content(shard, tokens, bar)
        return TokenStream(files, self.end_id, split["documents"], split["bytes"], split["words"], self._loss_mask(name))

    def check_tokenizer(self, digest: str) -> None:
        """Raise `DataError` unless the tokens were encoded with the tokenizer of that digest."""
        if digest != self.tokenizer:
            raise DataError(f"{self.folder}: made with tokenizer {self.tokenizer}, not {digest}; {AGAIN}")

    def _loss_mask(self, name: str) -> np.ndarray | None:
        if self.targets is None:
            return None
        path = self.folder / TARGETS
        if not path.is_file() or sha256(path) != self.targets:
            raise DataError(f"{path}: missing or not what was written; {AGAIN}")
        with np.load(path, allow_pickle=False) as masks:
            return masks[name]

    def _check_size(self, shard: dict) -> None:
        path = self.folder / shard["file"]
        size = path.stat().st_size if path.is_file() else "no"
        wanted = shard["tokens"] * self.dtype.itemsize
        if size != wanted:
            raise DataError(f"{path}: {size} bytes, but {wanted} were written; {AGAIN}")

    def _check_content(self, shard: dict, tokens: np.ndarray, bar: tqdm) -> None:
        path = self.folder / shard["file"]
        digest = hashlib.sha256()
        largest = 0
        for start in range(0, len(tokens), READ_TOKENS):
            part = tokens[start : start + READ_TOKENS]
            digest.update(part.tobytes())
            largest = max(largest, int(part.max()))
            bar.update(len(part))
        if digest.hexdigest() != shard["sha256"]:
            raise DataError(f"{path}: its SHA-256 is {digest.hexdigest()}, but {shard['sha256']} was written; {AGAIN}")
        if largest >= self.vocab_size:
            raise DataError(f"{path}: token id {largest} is outside the vocabulary of {self.vocab_size}; {AGAIN}")


def _read_manifest(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise DataError(f"{path.parent}: no manifest.json, so no token shards; run the stage `shards`")
    try:
        manifest = read_json(path)
        if isinstance(manifest, dict) and manifest.get("version") != VERSION:
            raise ParamsError(f"shards of version {manifest.get('version')}, not {VERSION}")
        read(_Manifest, manifest)
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: {error}; {AGAIN}") from None
    return manifest
