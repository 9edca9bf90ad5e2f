"""Byte-level BPE: learning the vocabulary, and an encoding that loses no byte.

Merges of byte pairs after Sennrich et al. 2016 (1508.07909), over bytes and cut into words by a regular expression
as in GPT-2 (Radford et al. 2019) or by the `cl100k_base` expression of tiktoken that GPT-4 uses.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

from stacklm.config.tokenizer import END_OF_TEXT, TokenizerConfig
from stacklm.data import DataError
from stacklm.data.documents import read_split
from stacklm.files import read_json, sha256, write_json, write_text

PATTERNS = {
    "gpt2": r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "gpt4": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
STRAY_BYTES = re.compile("([\udc80-\udcff]+)")
"""How Python's `surrogateescape` spells bytes that are no UTF-8; no valid UTF-8 decodes to these."""


def train_tokenizer(config: TokenizerConfig, documents: Path, tokenizer: Path) -> None:
    """Stage `tokenizer`: learn exactly `vocab_size` tokens from the train split.

    Writes `tokenizer/tokenizer.json` (the format of Hugging Face tokenizers) and `tokenizer/token_bytes.json` (the bytes
    of text each id stands for). Raises `DataError` if the text supports fewer tokens, naming how many.
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
    with tqdm(total=size, desc="tokenizer", unit="B", unit_scale=True, mininterval=0.5) as bar:
        bpe.train_from_iterator(_training_text(documents, bar), trainer)
    _check_size(bpe.get_vocab_size(), config)
    _check_special_tokens(bpe, config)
    write_text(tokenizer / "tokenizer.json", bpe.to_str(pretty=True))
    spellings = [bpe.id_to_token(i) for i in range(bpe.get_vocab_size())]
    special = len(config.special_tokens)  # they come first; any other token has one character a byte
    write_json(tokenizer / "token_bytes.json", [0] * special + [len(spelling) for spelling in spellings[special:]])
    print(f"tokenizer: {len(spellings):,} tokens, {special} of them special, {config.pretokenizer} words")


class Tokenizer:
    """A learned vocabulary. Every sequence of bytes can be encoded and is decoded exactly.

    Text that spells a special token is encoded as the text it is.
    """

    def __init__(self, bpe: tokenizers.Tokenizer, bytes_per_token: np.ndarray, digest: str) -> None:
        self.bytes_per_token = bytes_per_token
        self.digest = digest
        self.vocab_size = bpe.get_vocab_size()
        self.end_id = bpe.token_to_id(END_OF_TEXT)
        self._bpe = bpe
        self._bpe.encode_special_tokens = True
        byte_of = _byte_of_character()
        self._bytes_of = [
            bytes(byte_of[character] for character in bpe.id_to_token(i)) if size else b"" for i, size in enumerate(bytes_per_token)
        ]
        self._id_of_byte = [bpe.token_to_id(character) for character in sorted(byte_of, key=byte_of.get)]

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Read the folder that `train_tokenizer` wrote. `digest` is the SHA-256 of its files."""
        if not (folder / "tokenizer.json").exists():
            raise DataError(f"{folder}: no tokenizer.json; run the stage `tokenizer`")
        bpe = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        sizes = np.array(read_json(folder / "token_bytes.json"), dtype=np.int64)
        if len(sizes) != bpe.get_vocab_size():
            raise DataError(f"{folder}: token_bytes.json has {len(sizes)} tokens, tokenizer.json {bpe.get_vocab_size()}")
        return cls(bpe, sizes, sha256(folder))

    def encode(self, text: bytes | str) -> list[int]:
        """The ids of one text, without an end token."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Iterable[bytes | str]) -> list[list[int]]:
        """The ids of each text, on all cores."""
        parts = [_utf8_and_stray(text) for text in texts]
        encodings = iter(self._bpe.encode_batch_fast([utf8 for part in parts for utf8 in part[::2]]))
        return [self._join(part, encodings) for part in parts]

    def decode(self, ids: Iterable[int]) -> bytes:
        """The bytes that the ids stand for; special tokens stand for none. Raises `DataError` for an unknown id."""
        ids = [int(i) for i in ids]
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise DataError(f"token id {i} is not in the vocabulary of {self.vocab_size} tokens (0 to {self.vocab_size - 1})")
        return b"".join([self._bytes_of[i] for i in ids])

    def _join(self, part: list[str], encodings: Iterator[tokenizers.Encoding]) -> list[int]:
        ids = next(encodings).ids
        for stray in part[1::2]:
            ids += [self._id_of_byte[ord(character) - 0xDC00] for character in stray]
            ids += next(encodings).ids
        return ids


def _utf8_and_stray(text: bytes | str) -> list[str]:
    """Valid text at the even places, runs of bytes that are no UTF-8 between them at the odd places."""
    if isinstance(text, str):
        text = text.encode("utf-8", "surrogatepass")
    return STRAY_BYTES.split(text.decode("utf-8", "surrogateescape"))


def _training_text(documents: Path, bar: tqdm) -> Iterator[str]:
    for document in read_split(documents, "train"):
        yield from _utf8_and_stray(document)[::2]
        bar.update(len(document))
    bar.set_description("tokenizer: learning merges")


def _byte_of_character() -> dict[str, int]:
    """GPT-2's spelling of bytes: a printable Latin-1 character stands for itself, the others for 256, 257, ... in order."""
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
    """A special token that text was merged into would stand for that text, and for nothing at the same time."""
    merges = json.loads(bpe.to_str())["model"]["merges"]
    spelled = {left + right for left, right in merges} | set(pre_tokenizers.ByteLevel.alphabet())
    for token in config.special_tokens:
        if token in spelled:
            raise DataError(f"tokenizer.special_tokens: {token!r} is also a word of the text; write it like {END_OF_TEXT!r}")
