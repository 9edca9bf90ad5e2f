"""Texts, and what the stages `inputs`, `download` and `tokenizer` make of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from stacklm.config.data import Data, FilesSource
from stacklm.config.tokenizer import TokenizerConfig
from stacklm.data.documents import SPLITS, written_split
from stacklm.data.download import download
from stacklm.data.sources import list_inputs
from stacklm.data.tokenizer import train_tokenizer
from stacklm.files import write_json, write_jsonl


def write_texts(path: Path, texts: Iterable[str | None]) -> None:
    """A file of JSON lines with a text each."""
    write_jsonl(path, ({"text": text} for text in texts))


def write_documents(folder: Path, texts: Mapping[str, Sequence[bytes]]) -> Path:
    """The documents of each split, and their record, without a source."""
    for split in SPLITS:
        with written_split(folder, split) as writer:
            for text in texts[split]:
                writer.write(text)
    counts = {split: {"documents": len(texts[split]), "bytes": sum(map(len, texts[split]))} for split in SPLITS}
    write_json(folder / "record.json", {"splits": counts})
    return folder


def download_documents(root: Path, data: Data, name: str = "documents") -> Path:
    """The folder of the documents of a source, whose paths start at `root`."""
    with contextlib.chdir(root):
        list_inputs(data, Path("inputs.json"))
        download(data, Path("inputs.json"), Path(name))
    return root / name


def prepare_tokenizer(root: Path, source: FilesSource, vocab_size: int) -> Path:
    """The folder of a tokenizer, beside that of the documents of a source on which it was trained."""
    documents = download_documents(root, Data(source, valid_fraction=0.2, test_fraction=0.2))
    train_tokenizer(TokenizerConfig(vocab_size), documents, root / "tokenizer")
    return root / "tokenizer"
