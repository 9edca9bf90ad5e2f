"""Benchmarks as run by a user: as a command, and as part of the pipeline."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stacklm.files import read_json
from stacklm.pipeline.runner import history
from support import edit
from support.checkout import Checkout

PAIRS = [{"sentence_good": f"def f{i}(a):", "sentence_bad": f"f{i} def a(:)", "UID": f"set{i % 2}"} for i in range(6)]


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_model_is_scored_by_its_name_and_by_its_folder(finished: Checkout, tmp_path: Path) -> None:
    pairs = str(write(tmp_path / "pairs.jsonl", PAIRS))
    wiki = tmp_path / "wiki.raw"
    wiki.write_text("= Title =\nSome words .\n")
    text = finished.cli("benchmark", "dense", "--blimp", pairs, "--wikitext", str(wiki), "--limit", "2")
    assert "blimp, accuracy" in text and "wikitext, word perplexity" in text and "GPT-BERT" in text
    found = [finished.cli("benchmark", model, "--blimp", pairs, "--json") for model in ("dense-1", "out/models/dense-1")]
    figures = [json.loads(one[one.index("{\n") : one.rindex("}") + 1]) for one in found]
    assert figures[0] == figures[1]
    assert figures[0]["blimp"]["items"] == 6 and figures[0]["blimp"]["sets"].keys() == {"set0", "set1"}


def test_a_row_that_is_no_item_is_named(finished: Checkout, tmp_path: Path) -> None:
    bad = write(tmp_path / "bad.jsonl", [*PAIRS, {"sentence_good": "a", "UID": "b"}])
    assert "bad.jsonl:7: no key `sentence_bad`" in finished.cli("benchmark", "--blimp", str(bad), code=2)


@pytest.mark.slow
def test_benchmarks_are_part_of_the_pipeline(checkout: Checkout) -> None:
    file = write(checkout.root / "pairs.jsonl", PAIRS)
    edit(checkout.root / "params.yaml", "evaluate:\n", "evaluate:\n  benchmarks: [{kind: blimp, path: pairs.jsonl}]\n")
    checkout.repro()
    scores = read_json(checkout.root / "out/evaluations/dense-1.json")["benchmarks"]["blimp"]["scores"]
    assert read_json(checkout.root / "out/metrics.json")["dense"]["blimp_accuracy"] == scores["accuracy"]["value"]
    assert "blimp, accuracy" in checkout.cli("report")
    before = len(history(checkout.project))
    write(file, PAIRS[:4])
    said = checkout.cli("status")
    assert "will run: a benchmark's files changed" in said and "4 of 11 stages are stale" in said
    checkout.repro()
    assert {row["stage"] for row in history(checkout.project)[before:]} == {
        *("inputs", "evaluate@dense-1", "evaluate@stacked-1", "compare")
    }
    write(file, PAIRS)
    assert "evaluate@dense-1    will be restored from the cache: upstream inputs is stale" in checkout.cli("status")
    write(file, [{"sentence_good": "a"}])
    assert "pairs.jsonl:1: no key `sentence_bad`" in checkout.repro(code=None)
