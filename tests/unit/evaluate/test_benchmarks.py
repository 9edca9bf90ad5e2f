"""Benchmark scores, compared with reference implementations and values computed by hand."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from stacklm.config.evaluate import Benchmark
from stacklm.data.benchmarks import Item
from stacklm.evaluate import benchmarks as module
from stacklm.evaluate.benchmarks import FIGURES, Scorer, mean_interval, perplexity, share
from support.evaluated import CONFIG, CONTEXT, Project
from support.train_files import MODELS


def scorer_of(project: Project, kind: str = "dense") -> Scorer:
    return Scorer.load(CONFIG, project.root / project.save(f"scored-{kind}", kind), project.tokenizer)


def reference(scorer: Scorer, context: Sequence[int], continuation: Sequence[int]) -> tuple[float, bool]:
    """Every token by itself, in the window that lm-eval has it in: as many as the model reads, the last of them full."""
    total, greedy, ids = 0.0, True, [*context, *continuation]
    for i in range(len(continuation)):
        end = min((i // CONTEXT + 1) * CONTEXT, len(continuation)) + len(context)
        start = max(end - CONTEXT - 1, 0)
        with torch.no_grad():
            logits_V = scorer.model(torch.tensor([ids[start : len(context) + i]]))[0, -1].double()
        total += logits_V.log_softmax(0)[continuation[i]].item()
        greedy &= int(logits_V.argmax()) == continuation[i]
    return total, greedy


@pytest.mark.parametrize("kind", MODELS)
def test_each_token_is_predicted_from_all_before_it_that_fit(project, kind):
    scorer, draw = scorer_of(project, kind), random.Random(1)
    for before, after in ((1, 1), (3, 5), (8, 9), (40, 3), (2, CONTEXT), (5, CONTEXT + 1), (1, 3 * CONTEXT + 7)):
        context, continuation = ([draw.randrange(280) for _ in range(n)] for n in (before, after))
        total, greedy = scorer.loglikelihood(context, continuation)
        expected = reference(scorer, context, continuation)
        assert total == pytest.approx(expected[0], rel=1e-6)
        assert greedy == expected[1]
        said = [int(scorer.model(torch.tensor([context[-CONTEXT:]]))[0, -1].argmax())]
        assert scorer.loglikelihood(context, said)[1]


@pytest.mark.parametrize("kind", MODELS)
def test_an_answer_depends_on_nothing_else_that_is_asked(project, kind):
    scorer = scorer_of(project, kind)
    items = [Item("the sum" * (i % 5), (" of" * (1 + i % 3), f" {i} and {i * i}")) for i in range(40)]
    first = [scorer.answer(item) for item in items]
    order = random.Random(2).sample(range(40), 40)
    assert {i: scorer.answer(items[i]) for i in order} == dict(enumerate(first))


def test_texts_are_encoded_together_with_white_space_on_the_right(project):
    scorer = scorer_of(project)
    words = scorer.words
    assert scorer.encode("", " the sum") == ([], words.encode(" the sum"))
    assert scorer.encode(" ", "the sum") == ([], words.encode(" the sum"))
    assert scorer.loglikelihood([], [5, 6]) == scorer.loglikelihood([words.end_id], [5, 6])
    with pytest.raises(ValueError, match="without a token of its own"):
        scorer.loglikelihood([5], [])
    context, continuation = scorer.encode("the sum \n", "of 4")
    assert words.decode(context) == b"the sum" and words.decode(continuation) == b" \nof 4"
    assert [*context, *continuation] == words.encode("the sum \nof 4")


def test_a_tie_of_a_pair_is_wrong_and_is_told():
    items = [Item("", ("a", "b"), group=name) for name in ("x", "x", "y")]
    answers = [[(-1.0, False), (-2.0, False)], [(-3.0, False), (-3.0, False)], [(-4.0, False), (-3.0, False)]]
    figures = FIGURES["blimp"](items, answers)
    assert figures["ties"] == 1
    assert figures["scores"]["accuracy"]["value"] == pytest.approx(1 / 3)
    assert {name: one["value"] for name, one in figures["sets"].items()} == {"x": 0.5, "y": 0.0}


def test_choices_are_compared_as_they_are_and_by_their_length():
    items = [Item("", (" é", " abcdef", " abc"), answer=1)]
    figures = FIGURES["multiple_choice"](items, [[(-1.5, False), (-4.2, False), (-2.4, False)]])
    rights = {name: one["value"] for name, one in figures["scores"].items()}
    assert rights == {"accuracy": 0.0, "accuracy_norm": 1.0, "accuracy_bytes": 1.0}
    figures = FIGURES["multiple_choice"](items, [[(-1.3, False), (-4.2, False), (-2.4, False)]])
    assert figures["scores"]["accuracy_bytes"]["value"] == 0.0  # two bytes, one character
    assert figures["chance"] == pytest.approx(1 / 3)


def test_a_passage_counts_if_every_token_of_its_last_word_is_the_likeliest():
    answers = [[(-1.0, True)], [(-2.0, False)], [(-3.0, False)]]
    figures = FIGURES["lambada"]([Item("a", (" b",))] * 3, answers)
    assert figures["scores"]["accuracy"]["value"] == pytest.approx(1 / 3)
    assert figures["scores"]["perplexity"]["value"] == pytest.approx(math.exp(2))


def test_articles_weigh_by_their_words():
    items = [Item("", ("a",), words=10, bytes=50), Item("", ("b",), words=30, bytes=150)]
    scores = FIGURES["wikitext"](items, [[(-20.0, False)], [(-180.0, False)]])["scores"]
    assert scores["word_perplexity"]["value"] == pytest.approx(math.exp(5))
    assert scores["bits_per_byte"]["value"] == pytest.approx(1 / math.log(2))


def test_intervals_cover_as_often_as_they_say():
    """Wilson's over items, and the bootstrap of a ratio: 95% of intervals hold the truth, within the error of the simulation."""
    draw = np.random.default_rng(3)
    wilson = [share(list(draw.random(60) < 0.7)) for _ in range(400)]
    assert np.mean([one["low"] <= 0.7 <= one["high"] for one in wilson]) == pytest.approx(0.95, abs=0.03)
    covered = []
    for _ in range(200):
        sizes = draw.integers(50, 200, 60)
        one = mean_interval(list(sizes * (2 + draw.normal(0, 0.3, 60))), list(sizes))
        covered.append(one["low"] <= 2 <= one["high"])
    assert np.mean(covered) == pytest.approx(0.95, abs=0.05)
    assert mean_interval([3.0], [2]) == {"value": 1.5, "low": 1.5, "high": 1.5}
    assert perplexity([9e9], [1])["value"] == math.exp(700)


def test_the_stage_writes_the_figures_of_every_benchmark(project, monkeypatch):
    monkeypatch.setattr(module, "DRAWS", 50)
    pair = {"sentence_good": "the sum of 3", "sentence_bad": "sum the of 3", "UID": "order"}
    (project.root / "pairs.jsonl").write_text(json.dumps(pair) + "\n")
    (project.root / "wiki.raw").write_text("= Numbers =\nthe sum of 4 and 16 is 20 .\n")
    wanted = (Benchmark("blimp", "pairs.jsonl", name="mine"), Benchmark("wikitext", "wiki.raw"))
    found = project.evaluate(project.save("both"), replace(CONFIG, benchmarks=wanted))["benchmarks"]
    assert list(found) == ["mine", "wikitext"]
    assert found["mine"]["sets"].keys() == {"order"} and found["mine"]["unit"] == "pairs"
    assert found["wikitext"]["scores"]["word_perplexity"]["value"] > 1
    assert project.evaluate(project.save("none"))["benchmarks"] == {}
