"""Benchmark files are read as items, and errors name file, line and key."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest

from stacklm.config.evaluate import Benchmark, Evaluate
from stacklm.config.schema import ParamsError, read
from stacklm.data import DataError
from stacklm.data.benchmarks import Item, detokenize, list_benchmarks, read_items, read_listed
from stacklm.files import read_json, write_jsonl

pytestmark = pytest.mark.usefixtures("project")
PAIR = {"sentence_good": "Dogs bark.", "sentence_bad": "Dogs barks.", "UID": "agreement"}
QUESTION = {"context": "Two and two make", "choices": ["four", "five"], "answer": 0}
WIKITEXT = (
    " \n = Some Town = \n \n A town ( small ) , of 1 @,@ 200 people . \n = = History = = \n It 's old .\n \n = Other = \n Text .\n"
)


def items(kind: str, *rows: object, **settings: object) -> list[Item]:
    Path("file.jsonl").write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return read_items(read(Benchmark, {"kind": kind, "path": "file.jsonl", **settings}))


def test_pairs_are_whole_sentences_in_sets_of_which_each_has_its_limit():
    rows = [PAIR, PAIR, {**PAIR, "UID": "other"}, PAIR]
    assert items("blimp", *rows)[0] == Item("", (" Dogs bark.", " Dogs barks."), group="agreement")
    assert [one.group for one in items("blimp", *rows, limit=2)] == ["agreement", "agreement", "other"]


def test_the_last_word_of_a_passage_is_asked_for():
    assert items("lambada", {"text": "She saw\n\nthe  sea"}) == [Item("She saw\n\nthe ", (" sea",))]


@pytest.mark.parametrize("answer", [1, "1", "five"])
def test_a_question_names_the_right_choice_by_place_or_text(answer):
    row = {"ctx": "Two and three make", "endings": ["four", "five"], "label": answer}
    keys = {"context_key": "ctx", "choices_key": "endings", "answer_key": "label"}
    assert items("multiple_choice", row, **keys) == [Item("Two and three make", (" four", " five"), answer=1)]


def test_articles_begin_at_headings_and_their_words_are_counted_before_detokenization():
    Path("wiki.raw").write_text(WIKITEXT)
    one, two = read_items(Benchmark("wikitext", "wiki.raw"))
    assert one.continuations[0].strip() == "= Some Town =\n\nA town (small), of 1,200 people.\n== History ==\nIt's old ."
    assert (one.words, two.words) == (len(re.split(r"\s+", WIKITEXT[: WIKITEXT.index(" = Other")])), 7)
    assert one.bytes + two.bytes == len(WIKITEXT) - len(" \n") - len("\n")  # what is before the first, and between them


def test_compressed_files_are_read_alike():
    plain = items("blimp", PAIR, PAIR)
    Path("file.jsonl.gz").write_bytes(gzip.compress(Path("file.jsonl").read_bytes()))
    assert read_items(Benchmark("blimp", "file.jsonl.gz")) == plain
    write_jsonl(Path("pages.jsonl"), [{"page": WIKITEXT}])
    (page,) = read_items(Benchmark("wikitext", "pages.jsonl"))
    assert page.continuations == (detokenize(WIKITEXT),)


@pytest.mark.parametrize(
    "kind, rows, message",
    [
        ("blimp", [PAIR, {**PAIR, "sentence_bad": 3}], r"file.jsonl:2: key `sentence_bad`: expected a text, got 3"),
        ("blimp", [{"sentence_good": "a"}], r"file.jsonl:1: no key `sentence_bad`, only sentence_good"),
        ("blimp", [PAIR, "{"], r"file.jsonl:2: not a line of JSON"),
        ("blimp", [], r"file.jsonl: holds no item \(benchmark blimp\)"),
        ("lambada", [{"text": "word"}], r"file.jsonl:1: key `text`: expected words"),
        ("lambada", [{"text": "two words "}], r"file.jsonl:1: key `text`: expected words"),
        ("multiple_choice", [{**QUESTION, "choices": ["four"]}], r"file.jsonl:1: key `choices`: expected a list of two texts"),
        ("multiple_choice", [{**QUESTION, "answer": 2}], r"file.jsonl:1: key `answer`: .* place, 0 to 1, got 2"),
        ("multiple_choice", [{**QUESTION, "answer": True}], r"file.jsonl:1: key `answer`"),
        ("multiple_choice", [{**QUESTION, "answer": "six"}], r"file.jsonl:1: key `answer`"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(kind, rows, message):
    with pytest.raises(DataError, match=message):
        items(kind, *rows)


def test_a_file_that_is_missing_or_of_another_kind_is_named():
    with pytest.raises(DataError, match=r"absent.jsonl: no such file \(benchmark blimp; relative paths start at "):
        read_items(Benchmark("blimp", "absent.jsonl"))
    Path("text.txt").write_text("text")
    with pytest.raises(DataError, match=r"of kind lambada is a .jsonl file"):
        read_items(Benchmark("lambada", "text.txt"))


def test_a_listed_file_is_read_only_as_it_was_listed():
    benchmark, listing = Benchmark("blimp", "file.jsonl"), Path("benchmarks.json")
    listed = items("blimp", PAIR)
    list_benchmarks([benchmark], listing)
    assert read_json(listing)["blimp"]["items"] == 1
    assert read_listed(benchmark, listing) == listed
    items("blimp", PAIR, PAIR)
    with pytest.raises(DataError, match=r"file.jsonl: changed since it was listed"):
        read_listed(benchmark, listing)


def test_benchmarks_have_names_of_their_own():
    one = {"kind": "multiple_choice", "path": "a.jsonl"}
    both = read(Evaluate, {"benchmarks": [one, {**one, "name": "mine"}]})
    assert [benchmark.title for benchmark in both.benchmarks] == ["multiple_choice", "mine"]
    for wrong, message in (
        ([one, one], "multiple_choice occurs twice"),
        ([{**one, "name": "a b"}], r"evaluate.benchmarks\[0\]: name: 'a b' is not allowed"),
        ([{**one, "kind": "blmp"}], r"benchmarks\[0\].kind: 'blmp' is not allowed.*did you mean `blimp`"),
    ):
        with pytest.raises(ParamsError, match=message):
            read(Evaluate, {"benchmarks": wrong}, "evaluate")


def test_running_text_is_made_of_wikitexts_words():
    assert detokenize("He said \" yes \" : 3 @.@ 5 @-@ metre [ a ] ' b ' .\n") == "He said \"yes\": 3.5-metre [a] 'b' .\n"
