"""Training a vocabulary, and lossless encoding."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from itertools import chain, pairwise

import numpy as np
import pytest
import tokenizers

from stacklm.config.tokenizer import END_OF_TEXT, TokenizerConfig
from stacklm.data import DataError
from stacklm.data.documents import SPLITS
from stacklm.data.tokenizer import Tokenizer, train_tokenizer
from stacklm.files import read_json, sha256, write_json
from support import ROOT
from support.corpus import write_documents

WORDS = ["the", "stack", "of", "layers", "reads", "x", "1234567", "IT'S", "don't", "café", "中文", "\U0001f600", END_OF_TEXT]
SPACES = [" ", "  ", "\n", "\n\n", "\t", ", ", ". ", "\r\n", "\u3000"]


def some_text(seed, words=4_000):
    rng = random.Random(seed)
    return "".join(rng.choice(WORDS) + rng.choice(SPACES) for _ in range(words))


def learned_from(tmp_path, *texts, **settings):
    """The tokenizer of these documents, which all three splits have."""
    train_tokenizer(TokenizerConfig(**settings), same_in_all(tmp_path / "documents", *texts), tmp_path / "tokenizer")
    return Tokenizer.load(tmp_path / "tokenizer")


def same_in_all(folder, *texts):
    return write_documents(folder, dict.fromkeys(SPLITS, texts))


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    texts = [some_text(seed).encode() + b"\xff\xfe stray " for seed in range(3)]
    return same_in_all(tmp_path_factory.mktemp("documents"), *texts)


@pytest.fixture(scope="module", params=["gpt2", "gpt4"])
def pretokenizer(request):
    return request.param


@pytest.fixture(scope="module")
def folder(pretokenizer, documents, tmp_path_factory):
    folder = tmp_path_factory.mktemp(pretokenizer) / "tokenizer"
    config = TokenizerConfig(320, pretokenizer, (END_OF_TEXT, "<|user|>"))
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
    pieces = {}
    for name in ("gpt2", "gpt4"):
        tokenizer = learned_from(tmp_path / name, b" 1234567" * 50 + b" hello there" * 5, vocab_size=264, pretokenizer=name)
        pieces[name] = [tokenizer.decode([i]) for i in tokenizer.encode(" 1234567")]
    assert pieces == {"gpt2": [b" 1234567"], "gpt4": [b" ", b"123", b"456", b"7"]}


def test_pairs_rarer_than_asked_for_are_not_merged(tmp_path):
    text = b"often often often rare"
    tokenizer = learned_from(tmp_path, text, vocab_size=261, min_frequency=3)
    assert len(tokenizer.encode("often rare")) == 1 + len(" rare")
    with pytest.raises(DataError, match=r"pairs seen at least 4 times.* lower tokenizer\.min_frequency"):
        learned_from(tmp_path, text, vocab_size=261, min_frequency=4)


def test_stray_bytes_teach_the_vocabulary_nothing(tmp_path):
    tokenizer = learned_from(tmp_path, b"ab" * 50 + b"\xff\xfe" * 500 + b"ab" * 50, vocab_size=258)
    assert tokenizer.decode([257]) == b"ab"


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


def test_training_gives_the_same_bytes_in_every_process_and_with_any_threads(tmp_path, documents, folder, pretokenizer):
    program = (
        "import sys; from pathlib import Path; from stacklm.config.tokenizer import *; from stacklm.data.tokenizer import *;"
        "config = TokenizerConfig(320, sys.argv[1], (END_OF_TEXT, '<|user|>'));"
        "train_tokenizer(config, Path(sys.argv[2]), Path(sys.argv[3]))"
    )
    settings = [{"TOKENIZERS_PARALLELISM": "false"}, {"RAYON_NUM_THREADS": "3", "TOKENIZERS_PARALLELISM": "true"}]
    for i, setting in enumerate(settings):
        out = tmp_path / str(i)
        command = [sys.executable, "-c", program, pretokenizer, str(documents), str(out)]
        subprocess.run(command, env={**os.environ, **setting}, check=True, cwd=ROOT)
        assert sha256(out) == sha256(folder) == Tokenizer.load(folder).digest


LARGE_BLOCKS = [(0x3400, 0xA000), (0xAC00, 0xD7A4), (0xE000, 0xF900), (0x17000, 0x1B000), (0x20000, 0xE0000), (0xE0200, 0x110000)]
BETWEEN = [range(end, start) for (_, end), (start, _) in pairwise([(0, 0), *LARGE_BLOCKS, (0x110000, 0x110000)])]
SURROGATES = range(0xD800, 0xE000)
SOME_CODE_POINTS = [chr(c) for c in sorted({*range(0, 0x110000, 97), *chain(*BETWEEN)} - {*SURROGATES})]
RNG = random.Random(5)
PIECES = [*WORDS, *SPACES, "\r", "\x85", "\u2028", "\xa0", "'\u017f", "'S", "'re", "\u0130", "e\u0301\u0323"]
PIECES += ["\u200d", "\0", "\x1c", "\u09be"]
HOSTILE = {
    "empty": "",
    "special tokens": f"{END_OF_TEXT}a {END_OF_TEXT}<|user|>\n<|endoftext|",
    "CRLF": "a\r\nb\r\n\r\n  \r\n \r\tx\r\r\n \n",
    "long words": " ".join(["a" * 50_000, "".join(RNG.choices("abcdefgh", k=30_000)), "中" * 20_000 + "1" * 10_000 + "-" * 30_000]),
    "spaces": "".join(
        "x" + space * n for space in (" ", "\t", "\n", "\r\n", " \n", "\n ", "\u3000") for n in (1, 2, 1023, 1024, 1025, 1026, 2049)
    ),
    "ends in spaces": "x" + " " * 1024,
    "combining marks": "e\u0301" * 500 + " " + "a" + "\u0300" * 3_000 + " \u0301x",
    "emoji": "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea\U0001f3f4\U000e0067\u2764\ufe0f" * 50,
    "code points in order": "".join(SOME_CODE_POINTS),
    "code points shuffled": "".join(RNG.sample(SOME_CODE_POINTS, len(SOME_CODE_POINTS))),
    "code points between spaces": " ".join(SOME_CODE_POINTS),
    "mixtures": "".join(RNG.choices(PIECES, k=20_000)),
}


def check_against_tokenizers(tokenizer, folder, text):
    reference = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    reference.encode_special_tokens = True
    ids = tokenizer.encode(text)
    same = ids == reference.encode(text).ids  # no comparison of millions in the message
    assert same
    assert tokenizer.decode(ids) == text.encode()


@pytest.mark.parametrize("name", HOSTILE)
def test_the_ids_are_those_of_tokenizers(tokenizer, folder, name):
    """The file's own library and `tiktoken` agree, so other programs can read `tokenizer.json`."""
    check_against_tokenizers(tokenizer, folder, HOSTILE[name])


@pytest.mark.slow
def test_the_ids_of_every_code_point_are_those_of_tokenizers(tokenizer, folder):
    code_points = [chr(c) for c in range(0x110000) if c not in SURROGATES]
    check_against_tokenizers(tokenizer, folder, "".join(RNG.sample(code_points, len(code_points))))


def test_the_ids_around_invalid_utf8_are_those_of_tokenizers(tokenizer, folder):
    reference = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    rng = random.Random(6)
    for _ in range(200):
        data = bytes(rng.choices([*b" aes\n", 0xC3, 0xA9, 0xFF, 0xED, 0xA0, 0x80], k=60))
        parts = re.split("([\udc80-\udcff])", data.decode("utf-8", "surrogateescape"))
        ids = []
        for part in parts:
            invalid = "\udc80" <= part <= "\udcff"
            ids += tokenizer.encode(bytes([ord(part) - 0xDC00])) if invalid else reference.encode(part).ids
        assert tokenizer.encode(data) == ids


def test_white_space_and_words_of_any_length_can_be_encoded(tokenizer):
    """A regular expression engine with one state for each space gives up at a million."""
    for text in (" " * 1_200_000 + "x", "\n " * 600_000, "a" * 1_000_000):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text.encode()
    assert tokenizer.encode(" " * 1_200_000 + "x")[-20:] == tokenizer.encode(" " * 1_200 + "x")[-20:]


def test_time_grows_with_a_word_and_not_with_its_square(tokenizer):
    def seconds(letters):
        start = time.process_time()
        tokenizer.encode("ab" * (letters // 2))
        return time.process_time() - start

    seconds(1_000)
    assert seconds(1_600_000) < 64 * max(seconds(100_000), 0.01)  # 16 times the letters; a square would take 256 times


def test_white_space_and_words_of_any_length_can_be_learned_from(tmp_path):
    """Uncut, a word of a million letters takes hours, and `tokenizers` panics at ten million spaces."""
    letters = "".join(random.Random(3).choices("ab", k=100_000)).encode()
    texts = [b"xy zw " * 50, b" " * 11_000_000 + b"x", letters, b"\n " * 500_000, b"c" * 1_000_000]
    tokenizer = learned_from(tmp_path, *texts, vocab_size=300)
    learned = {tokenizer.decode([i]) for i in range(257, 300)}
    assert {b"  ", b"ab", b"cc"} <= learned


def test_encoding_opens_no_connection(folder):
    program = (
        "import socket, sys; from pathlib import Path\n"
        "def refuse(*a, **k): raise AssertionError('a connection')\n"
        "socket.socket.connect = socket.getaddrinfo = socket.create_connection = refuse\n"
        "from stacklm.data.tokenizer import Tokenizer\n"
        "print(Tokenizer.load(Path(sys.argv[1])).encode('the stack'))"
    )
    done = subprocess.run([sys.executable, "-c", program, str(folder)], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == str(Tokenizer.load(folder).encode("the stack")), done.stderr


def test_the_vocabulary_is_learned_from_the_train_split_alone(tmp_path):
    """Words of valid and test are seen by nothing that is learned: not in any amount, whatever the train split is."""
    texts = {"train": [b"ab " * 400], "valid": [b"qz " * 4000], "test": [b"jk " * 4000]}
    for name, others in (("together", texts), ("alone", {**texts, "valid": [b"ab "], "test": [b"ab "]})):
        train_tokenizer(TokenizerConfig(259), write_documents(tmp_path / f"{name}-documents", others), tmp_path / name)
    assert (tmp_path / "together/tokenizer.json").read_bytes() == (tmp_path / "alone/tokenizer.json").read_bytes()
    learned = Tokenizer.load(tmp_path / "together")
    assert {learned.decode([i]) for i in (257, 258)} == {b"ab", b" ab"}


def damaged(folder, tmp_path, file, content):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / file).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return copy


@pytest.mark.parametrize("file", ["tokenizer.json", "token_bytes.json"])
@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe", b"null", b"7", b'"x"', b"[]", b"{}", b"[" * 100_000, b"9" * 5_000, b"[[]]", "truncated"]
)
def test_a_damaged_file_is_an_error_with_its_name(folder, tmp_path, file, content):
    content = (folder / file).read_bytes()[:-400] if content == "truncated" else content
    with pytest.raises(DataError, match=rf"{file.replace('.', '[.]')}.*run the stage `tokenizer` again"):
        Tokenizer.load(damaged(folder, tmp_path, file, content))


def test_another_vocabulary_order_or_pattern_is_an_error(folder, tmp_path):
    def changed(change):
        content = read_json(folder / "tokenizer.json")
        change(content)
        copy = damaged(folder, tmp_path, "tokenizer.json", content)
        with pytest.raises(DataError, match=r"tokenizer\.json: damaged or of another program") as error:
            Tokenizer.load(copy)
        shutil.rmtree(copy)
        return str(error.value)

    assert "pattern" in changed(lambda content: content["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex="x+"))
    assert "special tokens" in changed(lambda content: content["added_tokens"].reverse())
    assert "vocabulary" in changed(lambda content: content["model"]["vocab"].update({"new": 320}))
    assert "vocabulary" in changed(lambda content: content["model"]["merges"].pop())
    assert "merge" in changed(lambda content: content["model"]["merges"].append(content["model"]["merges"][0]))
    assert "'zzz'" in changed(lambda content: content["model"]["merges"].append(["zzz", "a"]))
    for key in ("pre_tokenizer", "added_tokens", "model"):
        assert f"'{key}'" in changed(lambda content, key=key: content.pop(key))
    sizes = read_json(folder / "token_bytes.json")
    with pytest.raises(DataError, match=r"token_bytes\.json has other sizes"):
        Tokenizer.load(damaged(folder, tmp_path, "token_bytes.json", [*sizes[:-1], sizes[-1] + 1]))


def test_a_missing_or_torn_folder_is_an_error(tmp_path, folder):
    with pytest.raises(DataError, match=r"no tokenizer\.json; run the stage `tokenizer`"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    with pytest.raises(DataError, match=r"no token_bytes\.json"):
        Tokenizer.load(tmp_path)
    write_json(tmp_path / "token_bytes.json", [0, 0, 1])
    with pytest.raises(DataError, match=r"token_bytes\.json has 3 tokens, tokenizer\.json 320"):
        Tokenizer.load(tmp_path)
