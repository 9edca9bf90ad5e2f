"""The vocabulary, and encoding without loss."""

import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from stacklm.config.tokenizer import END_OF_TEXT, TokenizerConfig
from stacklm.data import DataError
from stacklm.data.documents import SPLITS, written_split
from stacklm.data.tokenizer import Tokenizer, train_tokenizer
from stacklm.files import read_json, sha256, write_json

WORDS = ["the", "stack", "of", "layers", "reads", "x", "1234567", "IT'S", "don't", "café", "中文", "\U0001f600", END_OF_TEXT]
SPACES = [" ", "  ", "\n", "\n\n", "\t", ", ", ". ", "\r\n", "\u3000"]


def some_text(seed, words=4_000):
    rng = random.Random(seed)
    return "".join(rng.choice(WORDS) + rng.choice(SPACES) for _ in range(words))


def write_documents(folder, texts):
    for split in SPLITS:
        with written_split(folder, split) as writer:
            for text in texts:
                writer.write(text)
    write_json(folder / "record.json", {"splits": {s: {"documents": len(texts), "bytes": sum(map(len, texts))} for s in SPLITS}})
    return folder


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    texts = [some_text(seed).encode() + b"\xff\xfe stray " for seed in range(3)]
    return write_documents(tmp_path_factory.mktemp("documents"), texts)


@pytest.fixture(scope="module", params=["gpt2", "gpt4"])
def folder(request, documents, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param) / "tokenizer"
    config = TokenizerConfig(320, request.param, (END_OF_TEXT, "<|user|>"))
    train_tokenizer(config, documents, folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return Tokenizer.load(folder)


def test_vocabulary_is_special_tokens_then_bytes_then_merges(tokenizer, folder):
    assert tokenizer.vocab_size == 320
    assert tokenizer.end_id == 0
    lengths = tokenizer.bytes_per_token
    assert lengths[:2].tolist() == [0, 0]
    assert lengths[2:258].tolist() == [1] * 256
    assert (lengths[258:] > 1).all()
    assert read_json(folder / "token_bytes.json") == lengths.tolist()
    for i in range(320):
        assert len(tokenizer.decode([i])) == lengths[i]
    assert {tokenizer.decode([i]) for i in range(2, 258)} == {bytes([b]) for b in range(256)}
    assert len({tokenizer.decode([i]) for i in range(2, 320)}) == 318


def test_any_bytes_survive(tokenizer):
    rng = random.Random(7)
    some = [b"\xc3\xa9\xe4\xb8", b"ab \n", "é中\U0001f600 <|endoftext|>".encode()]
    alphabets = [bytes(range(256)), bytes(range(0x80, 0x100)), *some]
    for _ in range(300):
        alphabet = rng.choice(alphabets)
        text = bytes(rng.choice(alphabet) for _ in range(rng.randrange(80)))
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert sum(tokenizer.bytes_per_token[ids]) == len(text)


def test_every_code_point_survives(tokenizer):
    for start in range(0, 0x110000, 0x8000):
        text = "".join(map(chr, range(start, start + 0x8000))).encode("utf-8", "surrogatepass")
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_stray_bytes_become_their_byte_tokens_and_leave_the_text_around_them_alone(tokenizer):
    before, stray, after = (tokenizer.encode(text) for text in (b"the stack", b"\xff\xc3", b" of layers"))
    assert [tokenizer.decode([i]) for i in stray] == [b"\xff", b"\xc3"]
    assert tokenizer.encode(b"the stack\xff\xc3 of layers") == before + stray + after


def test_text_and_its_utf8_are_the_same(tokenizer):
    text = some_text(9, 50)
    assert tokenizer.encode(text) == tokenizer.encode(text.encode())
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ud800b".encode("utf-8", "surrogatepass")


def test_merges_shorten_known_text(tokenizer):
    text = some_text(11).encode()
    assert len(tokenizer.encode(text)) < 0.6 * len(text)


def test_text_that_spells_a_special_token_stays_text(tokenizer):
    for text in (END_OF_TEXT, f"a{END_OF_TEXT}b", "<|user|> hello", f"\xff{END_OF_TEXT}"):
        ids = tokenizer.encode(text)
        assert min(ids) >= 2
        assert tokenizer.decode(ids) == text.encode()


def test_a_batch_is_its_texts_one_by_one(tokenizer):
    texts = [b"", b"\xff", some_text(3, 20).encode(), b"a\xffb\xfec", "é"]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


def test_special_tokens_decode_to_nothing_and_unknown_ids_are_errors(tokenizer):
    ids = np.array([0, *tokenizer.encode("the"), 1])
    assert tokenizer.decode(ids) == b"the"
    for unknown in (320, -1):
        with pytest.raises(DataError, match=rf"token id {unknown} is not in the vocabulary of 320 tokens \(0 to 319\)"):
            tokenizer.decode([5, unknown])


def test_pretokenizers_cut_digits_as_they_say(tmp_path):
    folder = write_documents(tmp_path / "documents", [b" 1234567" * 50 + b" hello there" * 5])
    pieces = {}
    for name in ("gpt2", "gpt4"):
        train_tokenizer(TokenizerConfig(264, name), folder, tmp_path / name)
        tokenizer = Tokenizer.load(tmp_path / name)
        pieces[name] = [tokenizer.decode([i]) for i in tokenizer.encode(" 1234567")]
    assert pieces == {"gpt2": [b" 1234567"], "gpt4": [b" ", b"123", b"456", b"7"]}


def test_pairs_rarer_than_asked_for_are_not_merged(tmp_path):
    folder = write_documents(tmp_path / "documents", [b"often often often rare"])
    train_tokenizer(TokenizerConfig(261, min_frequency=3), folder, tmp_path / "tokenizer")
    tokenizer = Tokenizer.load(tmp_path / "tokenizer")
    assert len(tokenizer.encode("often rare")) == 1 + len(" rare")
    with pytest.raises(DataError, match=r"pairs seen at least 4 times.* lower tokenizer\.min_frequency"):
        train_tokenizer(TokenizerConfig(261, min_frequency=4), folder, tmp_path / "none")


def test_stray_bytes_teach_the_vocabulary_nothing(tmp_path):
    folder = write_documents(tmp_path / "documents", [b"ab" * 50 + b"\xff\xfe" * 500 + b"ab" * 50])
    train_tokenizer(TokenizerConfig(258), folder, tmp_path / "tokenizer")
    assert Tokenizer.load(tmp_path / "tokenizer").decode([257]) == b"ab"


def test_a_vocabulary_too_large_for_the_text_names_the_largest_that_is_not(tmp_path, documents):
    with pytest.raises(DataError, match=r"train split supports [\d,]+ tokens, not 50,000 .* set it to at most \d+") as error:
        train_tokenizer(TokenizerConfig(50_000), documents, tmp_path / "tokenizer")
    most = int(str(error.value).split("at most ")[1].split(",")[0])
    train_tokenizer(TokenizerConfig(most), documents, tmp_path / "tokenizer")
    assert Tokenizer.load(tmp_path / "tokenizer").vocab_size == most
    with pytest.raises(DataError, match=f"supports {most:,} tokens"):
        train_tokenizer(TokenizerConfig(most + 1), documents, tmp_path / "more")


@pytest.mark.parametrize("word", ["layers", "a"])
def test_a_special_token_that_text_would_become_is_refused(tmp_path, documents, word):
    with pytest.raises(DataError, match=f"'{word}' is also a word of the text; write it like '<|endoftext|>'".replace("|", r"\|")):
        train_tokenizer(TokenizerConfig(320, special_tokens=(END_OF_TEXT, word)), documents, tmp_path / "tokenizer")


def test_training_gives_the_same_bytes_in_every_process_and_with_any_threads(tmp_path, documents, folder):
    program = (
        "import sys; from pathlib import Path; from stacklm.config.tokenizer import *; from stacklm.data.tokenizer import *;"
        "config = TokenizerConfig(320, sys.argv[1], (END_OF_TEXT, '<|user|>'));"
        "train_tokenizer(config, Path(sys.argv[2]), Path(sys.argv[3]))"
    )
    kind = read_json(folder / "tokenizer.json")["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
    name = "gpt4" if "{1,3}" in kind else "gpt2"
    settings = [{"TOKENIZERS_PARALLELISM": "false"}, {"RAYON_NUM_THREADS": "3", "TOKENIZERS_PARALLELISM": "true"}]
    for i, setting in enumerate(settings):
        out = tmp_path / str(i)
        command = [sys.executable, "-c", program, name, str(documents), str(out)]
        subprocess.run(command, env={**os.environ, **setting}, check=True, cwd=Path(__file__).parent.parent)
        assert sha256(out) == sha256(folder) == Tokenizer.load(folder).digest


def test_a_missing_or_torn_folder_is_an_error(tmp_path, folder):
    with pytest.raises(DataError, match=r"no tokenizer\.json; run the stage `tokenizer`"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    write_json(tmp_path / "token_bytes.json", [0, 0, 1])
    with pytest.raises(DataError, match=r"token_bytes\.json has 3 tokens, tokenizer\.json 320"):
        Tokenizer.load(tmp_path)
