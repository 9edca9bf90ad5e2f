"""Texts, and the outputs of the stages `inputs`, `download` and `tokenizer` for them."""

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
    """Write a JSON-lines file with one text per line."""
    write_jsonl(path, ({"text": text} for text in texts))


def write_documents(folder: Path, texts: Mapping[str, Sequence[bytes]]) -> Path:
    """Write the documents of each split, and their record, without a source."""
    for split in SPLITS:
        with written_split(folder, split) as writer:
            for text in texts[split]:
                writer.write(text)
    counts = {split: {"documents": len(texts[split]), "bytes": sum(map(len, texts[split]))} for split in SPLITS}
    write_json(folder / "record.json", {"splits": counts})
    return folder


def download_documents(root: Path, data: Data, name: str = "documents") -> Path:
    """Run the stages `inputs` and `download` for a source with paths relative to `root`; return the folder of documents."""
    with contextlib.chdir(root):
        list_inputs(data, Path("inputs.json"))
        download(data, Path("inputs.json"), Path(name))
    return root / name


def prepare_tokenizer(root: Path, source: FilesSource, vocab_size: int) -> Path:
    """Train a tokenizer on the documents of a source; return its folder, which is beside that of the documents."""
    documents = download_documents(root, Data(source, valid_fraction=0.2, test_fraction=0.2))
    train_tokenizer(TokenizerConfig(vocab_size), documents, root / "tokenizer")
    return root / "tokenizer"
