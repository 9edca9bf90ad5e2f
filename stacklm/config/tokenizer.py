"""Section `tokenizer`: byte-level BPE."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from stacklm.config.schema import Count, ParamsError, Range

END_OF_TEXT = "<|endoftext|>"
"""The token that ends every document; the first of the special tokens, so its id is 0."""


@dataclass(frozen=True)
class TokenizerConfig:
    """Byte-level BPE, learned on the train split."""

    vocab_size: Annotated[int, Range(257, 2**24)]
    """Size of the vocabulary: special tokens, the 256 bytes and the merges."""
    pretokenizer: Literal["gpt2", "gpt4"] = "gpt4"
    """gpt2: split text into words with their leading space. gpt4: also digits in groups of three, contractions in any case."""
    special_tokens: tuple[str, ...] = (END_OF_TEXT,)
    """Tokens that are never produced from text; the first one ends every document."""
    min_frequency: Count = 2
    """Minimum count of a pair to be merged."""

    def __post_init__(self) -> None:
        if self.special_tokens[:1] != (END_OF_TEXT,):
            raise ParamsError(f"special_tokens: {list(self.special_tokens)} must begin with {END_OF_TEXT!r}, which ends documents")
        if "" in self.special_tokens:
            raise ParamsError(f"special_tokens: {list(self.special_tokens)} holds an empty text")
        if len(set(self.special_tokens)) != len(self.special_tokens):
            raise ParamsError(f"special_tokens: {list(self.special_tokens)} names a token twice")
        if self.vocab_size < 256 + len(self.special_tokens):
            raise ParamsError(
                f"vocab_size: {self.vocab_size} has no room for the 256 bytes and {len(self.special_tokens)} special "
                f"tokens; it must be >= {256 + len(self.special_tokens)}"
            )
