"""Encoding speed: stacklm's tokenizer, which accepts any bytes, against plain `tiktoken` with the same merges.

    python benchmarks/encoding.py [--rounds 9]

The text is the default corpus, and the vocabulary that of params.yaml, trained on it. Both encoders alternate on the same
documents; figures are medians over rounds of MB per second of CPU time (user and system), and of their ratio. `tokenizers`,
which trains the vocabulary, is measured in one round. All ids are compared.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import tiktoken
import tokenizers
from bench import command_line, timed

from stacklm.config.data import Data, StdlibSource
from stacklm.config.params import load
from stacklm.console import table
from stacklm.data.documents import read_split
from stacklm.data.download import download
from stacklm.data.sources import list_inputs
from stacklm.data.tokenizer import PATTERNS, Tokenizer, train_tokenizer

ROOT = Path(__file__).resolve().parent.parent
Encoder = Callable[[bytes], list[int]]


def encoders(folder: Path, pattern: str) -> dict[str, Encoder]:
    """The encoders of stacklm, plain `tiktoken` and `tokenizers`, with the vocabulary in the folder."""
    ours = Tokenizer.load(folder)
    ranks = {ours.decode([i]): i for i in range(ours.vocab_size) if ours.bytes_per_token[i]}
    plain = tiktoken.Encoding("plain", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    learner = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    learner.encode_special_tokens = True
    return {
        "stacklm": ours.encode,
        "tiktoken": lambda text: plain.encode_ordinary(text.decode()),
        "tokenizers": lambda text: learner.encode(text.decode()).ids,
    }


def seconds(encode: Encoder, texts: list[bytes]) -> float:
    """CPU seconds to encode all texts."""
    return timed(lambda: [encode(text) for text in texts]).cpu


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    config = load(ROOT / "params.yaml").tokenizer
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(sys.stderr):
        folder = Path(name)
        data = Data(StdlibSource())
        list_inputs(data, folder / "inputs.json")
        download(data, folder / "inputs.json", folder / "documents")
        train_tokenizer(config, folder / "documents", folder / "tokenizer")
        documents = list(read_split(folder / "documents", "train"))
        ways = encoders(folder / "tokenizer", PATTERNS[config.pretokenizer])
    documents = [text for text in documents if text.decode("utf-8", "ignore").encode() == text]  # tiktoken accepts only UTF-8
    size = sum(map(len, documents)) / 1e6
    rows = []
    for kind, texts in (("documents", documents), ("one text", [b"".join(documents)])):
        ids = {way: [encode(text) for text in texts] for way, encode in ways.items()}  # also a warm-up
        assert ids["stacklm"] == ids["tiktoken"] == ids["tokenizers"]
        times = {way: [seconds(ways[way], texts)] for way in ("tokenizers",)}
        turns = [{way: seconds(ways[way], texts) for way in ("stacklm", "tiktoken")} for _ in range(rounds)]
        times |= {way: [turn[way] for turn in turns] for way in ("stacklm", "tiktoken")}
        speeds = [f"{statistics.median(size / found for found in times[way]):.2f}" for way in ways]
        ratios = sorted(turn["tiktoken"] / turn["stacklm"] for turn in turns)
        rows.append([f"{kind}: {len(texts):,}", *speeds, f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"])
    print(
        f"{size:.1f} MB of the default corpus, vocabulary {config.vocab_size:,}, pre-tokenizer {config.pretokenizer}; ids are equal"
    )
    print(f"MB per second of CPU time, median of {rounds} rounds; the ratio is that of stacklm to tiktoken\n")
    print(table(["text", *ways, "ratio"], rows))


if __name__ == "__main__":
    main()
