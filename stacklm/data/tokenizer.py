"""Byte-level BPE: training the vocabulary, and lossless encoding.

Byte-pair merges after Sennrich et al. 2016 (1508.07909), over bytes, with the pre-tokenization pattern of GPT-2 (Radford et al.
2019) or of GPT-4 (tiktoken's `cl100k_base`).
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import tiktoken
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

from stacklm.config.tokenizer import END_OF_TEXT, TokenizerConfig
from stacklm.data import DataError
from stacklm.data.documents import TextRecord, read_split
from stacklm.files import read_json, sha256, write_json, write_text
from stacklm.progress import progress

T = TypeVar("T")
PATTERNS = {
    "gpt2": r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "gpt4": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
TRAILING_SPACE = r"\s+(?!\S)"
TRAILING_SPACE_IN_BLOCKS = r"\s++(?!\S)|(?=\s\s)(?:(?>\s{1024})(?=\s))*+(?:\s(?=\s))*+"
"""Has the same matches. The regular-expression engine of `tiktoken` keeps one state per repetition, at most a million: in blocks
of 1024 it keeps a thousandth of them, so white space of any length can be encoded."""
LONG_RUN = re.compile(r"(\s{1024}|\S{1024})")
"""Where training text is cut. Training time of `tokenizers` is quadratic in the length of a word, and its regular expressions
fail after ten million backtracking steps through white space."""
RECORD = "record.json"
AGAIN = "run the stage `tokenizer` again"
STRAY_BYTES = re.compile("([\udc80-\udcff]+)")
"""Bytes that are not UTF-8, as decoded by Python's `surrogateescape`; valid UTF-8 never decodes to these."""


def train_tokenizer(config: TokenizerConfig, documents: Path, tokenizer: Path) -> None:
    """Stage `tokenizer`: train a vocabulary of exactly `vocab_size` tokens on the train split.

    Writes `tokenizer/tokenizer.json` (the format of Hugging Face tokenizers), `tokenizer/token_bytes.json` (each token's length
    in bytes of text) and `tokenizer/record.json` (the text it was trained on). Raises `DataError` if the text supports fewer
    tokens, with their number.
    """
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERNS[config.pretokenizer]), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        min_frequency=config.min_frequency,
        special_tokens=list(config.special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    size = read_json(documents / "record.json")["splits"]["train"]["bytes"]
    text = TextRecord()
    with progress(total=size, desc="tokenizer", unit="B", unit_scale=True) as bar:
        bpe.train_from_iterator(_training_text(documents, text, bar), trainer)
    _check_size(bpe.get_vocab_size(), config)
    _check_special_tokens(bpe, config)
    write_text(tokenizer / "tokenizer.json", bpe.to_str(pretty=True))
    vocab = bpe.get_vocab()
    spellings = sorted(vocab, key=vocab.__getitem__)
    special = len(config.special_tokens)  # they come first; any other token has one character per byte
    write_json(tokenizer / "token_bytes.json", [0] * special + [len(spelling) for spelling in spellings[special:]])
    write_json(tokenizer / RECORD, {"trained_on": text.plain()})
    print(f"tokenizer: {len(spellings):,} tokens, {special} of them special, {config.pretokenizer} words")


class Tokenizer:
    """A trained tokenizer. Any sequence of bytes can be encoded, and decoding returns it exactly.

    Text that spells a special token is encoded as ordinary text. `tiktoken` does the encoding: it is several times as fast as
    `tokenizers`, with the same ids.
    """

    def __init__(self, pattern: str, tokens: list[bytes], digest: str) -> None:
        """`tokens` [V] are the bytes of every id, empty for special tokens; the rank of a merge is its index in them."""
        self.bytes_per_token = np.array([len(token) for token in tokens], dtype=np.int64)
        self.digest = digest
        self.vocab_size = len(tokens)
        self.end_id = 0
        self._bytes_of = tokens
        self._id_of = {token: i for i, token in enumerate(tokens) if token}
        pattern = pattern.replace(TRAILING_SPACE, TRAILING_SPACE_IN_BLOCKS)
        self._encoding = tiktoken.Encoding("stacklm", pat_str=pattern, mergeable_ranks=self._id_of, special_tokens={})

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Load the tokenizer that `train_tokenizer` wrote to that folder. `digest` is the SHA-256 of its files.

        Raises `DataError`, naming the file, if one is missing, damaged or not written by this project.
        """
        pattern, tokens = _parse(folder / "tokenizer.json", _read_tokenizer)
        sizes = _parse(folder / "token_bytes.json", list)
        if len(sizes) != len(tokens):
            raise DataError(f"{folder}: token_bytes.json has {len(sizes)} tokens, tokenizer.json {len(tokens)}; {AGAIN}")
        if sizes != [len(token) for token in tokens]:
            raise DataError(f"{folder}: token_bytes.json has other sizes than the tokens of tokenizer.json; {AGAIN}")
        return cls(pattern, tokens, sha256(folder))

    def encode(self, text: bytes | str) -> list[int]:
        """The ids of one text, without an end token."""
        first, *others = _utf8_and_stray(text)
        ids = self._encoding.encode_ordinary(first)
        for stray, utf8 in zip(others[::2], others[1::2], strict=True):
            ids += [self._id_of[byte.encode("utf-8", "surrogateescape")] for byte in stray]
            ids += self._encoding.encode_ordinary(utf8)
        return ids

    def encode_batch(self, texts: Iterable[bytes | str]) -> list[list[int]]:
        """The ids of each text, on all cores."""
        with ThreadPoolExecutor() as pool:
            return list(pool.map(self.encode, texts))

    def decode(self, ids: Iterable[int]) -> bytes:
        """The bytes of the ids; special tokens have none. Raises `DataError` for an unknown id."""
        ids = [int(i) for i in ids]
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise DataError(f"token id {i} is not in the vocabulary of {self.vocab_size} tokens (0 to {self.vocab_size - 1})")
        return b"".join([self._bytes_of[i] for i in ids])


def _parse(path: Path, read: Callable[[Any], T]) -> T:
    """Apply `read` to a JSON file of the tokenizer; any error becomes a `DataError` that names the file."""
    if not path.exists():
        raise DataError(f"{path.parent}: no {path.name}; run the stage `tokenizer`")
    try:
        return read(read_json(path))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path}: damaged or of another program ({type(error).__name__}: {error}); {AGAIN}") from None


def _read_tokenizer(content: Any) -> tuple[str, list[bytes]]:
    """The pre-tokenizer's pattern and the bytes of every token, from the contents of `tokenizer.json`.

    Ids are special tokens, the 256 bytes, then the merges in order: the ranks by which `tiktoken` merges.
    """
    pattern = content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
    if pattern not in PATTERNS.values():
        raise ValueError(f"the pre-tokenizer's pattern {pattern!r} is none of {', '.join(PATTERNS)}")
    special = [token["content"] for token in content["added_tokens"]]
    if special[:1] != [END_OF_TEXT]:
        raise ValueError(f"the special tokens {special} do not begin with {END_OF_TEXT!r}")
    byte_of = _byte_of_character()
    ids = {spelling: i for i, spelling in enumerate([*special, *sorted(byte_of)])}
    for left, right in content["model"]["merges"]:
        if not ids[left] < len(ids) > ids[right] or left + right in ids:
            raise ValueError(f"the merge of {left!r} and {right!r} makes no new token")
        ids[left + right] = len(ids)
    if content["model"]["vocab"] != ids:
        raise ValueError("the vocabulary is not special tokens, bytes and merges in this order")
    return pattern, [b""] * len(special) + [bytes(byte_of[c] for c in spelling) for spelling in [*ids][len(special) :]]


def _utf8_and_stray(text: bytes | str) -> list[str]:
    """Split into valid text, at even indices, and runs of bytes that are not UTF-8, at odd indices."""
    if isinstance(text, str):
        text = text.encode("utf-8", "surrogatepass")
    with contextlib.suppress(UnicodeDecodeError):
        return [text.decode("utf-8")]
    return STRAY_BYTES.split(text.decode("utf-8", "surrogateescape"))


def check_trained_on(tokenizer: Path, text: TextRecord) -> None:
    """Raise `DataError` unless the tokenizer in the folder was trained on exactly this text, that of the train split."""
    trained_on = _parse(tokenizer / RECORD, lambda content: content["trained_on"])
    if trained_on != text.plain():
        raise DataError(f"{tokenizer}: trained on another text than the train split: {trained_on}, not {text.plain()}; {AGAIN}")


def _training_text(documents: Path, text: TextRecord, bar: tqdm) -> Iterator[str]:
    for document in read_split(documents, "train"):
        text.add(document)
        for part in _utf8_and_stray(document)[::2]:
            yield from filter(None, LONG_RUN.split(part))
        bar.update(len(document))
    bar.set_description("tokenizer: learning merges")


def _byte_of_character() -> dict[str, int]:
    """GPT-2's characters for bytes: a printable Latin-1 character is itself, the others are 256, 257, ... in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = sorted(set(range(256)) - set(printable))
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(hidden)}


def _check_size(learned: int, config: TokenizerConfig) -> None:
    if learned < config.vocab_size:
        raise DataError(
            f"tokenizer.vocab_size: the train split supports {learned:,} tokens, not {config.vocab_size:,} (pairs seen at least "
            f"{config.min_frequency} times); set it to at most {learned}, give more text or lower tokenizer.min_frequency"
        )


def _check_special_tokens(bpe: tokenizers.Tokenizer, config: TokenizerConfig) -> None:
    """Raise `DataError` for a special token that is also a merge: it would be ordinary text and a special token at once."""
    merges = json.loads(bpe.to_str())["model"]["merges"]
    spelled = {left + right for left, right in merges} | set(pre_tokenizers.ByteLevel.alphabet())
    for token in config.special_tokens:
        if token in spelled:
            raise DataError(f"tokenizer.special_tokens: {token!r} is also a word of the text; write it like {END_OF_TEXT!r}")
