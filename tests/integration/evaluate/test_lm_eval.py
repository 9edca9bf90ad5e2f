"""lm-eval and the project's scorers agree exactly on every item, for every batch size."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stacklm.config.evaluate import Benchmark
from stacklm.data.benchmarks import DETOKENIZE, detokenize, read_items
from stacklm.data.formats import Account, json_rows, opened, read_file
from stacklm.evaluate.benchmarks import Scorer, run_benchmarks
from support import ROOT
from support.evaluated import CONFIG, Project

lm_eval = pytest.importorskip("lm_eval", reason="needs the extra `eval`")

SHARED = Path(os.environ.get("STACKLM_SHARED", ROOT.parent / "shared")) / "data"
LINES = {"blimp": "blimp/blimp.jsonl.zst", "lambada": "lambada/lambada_test.jsonl"}
PAIRS = [{"sentence_good": f"the sum of {i}", "sentence_bad": f"of {i} sum the", "UID": f"set {i % 2}"} for i in range(6)]
PASSAGES = [{"text": f"paragraph {i}: the sum of {i}\n\nand {i * i} is {i + i * i}"} for i in range(6)]
PAGES = [f" \n = Page {i} = \n \n" + f' The sum , of {i} @-@ {i * i} ( " é " ) , is \'s .\n' * 5 for i in range(3)]
QUESTIONS = [
    {"context": f"the sum of {i} and {i} is ", "choices": [f"{i + i}", "é", "unknown"], "answer": i % 3} for i in range(12)
]
TASKS = {
    "blimp": """
output_type: multiple_choice
doc_to_text: ""
doc_to_target: 0
doc_to_choice: "{{[sentence_good, sentence_bad]}}"
metric_list: [{metric: acc}]
""",
    "lambada": """
output_type: loglikelihood
doc_to_text: "{{text.split(' ')[:-1]|join(' ')}}"
doc_to_target: "{{' '+text.split(' ')[-1]}}"
metric_list: [{metric: perplexity}, {metric: acc}]
""",
    "wikitext": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: !function preprocess_wikitext.wikitext_detokenizer
process_results: !function preprocess_wikitext.process_results
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
""",
    "multiple_choice": """
output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_target: "{{answer}}"
doc_to_choice: "{{choices}}"
metric_list: [{metric: acc}, {metric: acc_norm}, {metric: acc_bytes}]
""",
}
"""As lm-eval's own `blimp`, `lambada_openai` and `wikitext`, with data from a local file, and its form of multiple choice."""
METRICS = {
    "blimp": {"acc": "accuracy"},
    "lambada": {"acc": "accuracy", "perplexity": "perplexity"},
    "wikitext": {"word_perplexity": "word_perplexity", "bits_per_byte": "bits_per_byte"},
    "multiple_choice": {"acc": "accuracy", "acc_norm": "accuracy_norm", "acc_bytes": "accuracy_bytes"},
}


class Tasks:
    """Local files and the tasks of lm-eval that read them."""

    def __init__(self, folder: Path, rows: dict[str, list[dict]]) -> None:
        self.folder = folder
        (folder / "preprocess_wikitext.py").write_text("from lm_eval.tasks.wikitext.preprocess_wikitext import *\n")
        for kind, some in rows.items():
            (folder / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
            data = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder}/{kind}.jsonl}}}}\ntest_split: test\n"
            (folder / f"{kind}.yaml").write_text(f"task: local_{kind}\n{data}{TASKS[kind]}")

    def lm_eval(self, model: Any, **options: Any) -> dict[str, Any]:
        from lm_eval.tasks import TaskManager

        manager = TaskManager(include_path=str(self.folder), include_defaults=False)
        names = [f"local_{file.stem}" for file in self.folder.glob("*.yaml")]
        return lm_eval.simple_evaluate(model, tasks=names, task_manager=manager, bootstrap_iters=0, **options)

    def benchmark(self, kind: str) -> Benchmark:
        return Benchmark(kind, f"{self.folder}/{kind}.jsonl")  # pyright: ignore[reportArgumentType]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    before, after = Path.cwd(), {"HF_HOME": str(tmp_path_factory.mktemp("huggingface")), "HF_DATASETS_OFFLINE": "1"}
    os.chdir(tmp_path_factory.mktemp("project"))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in after.items():
            patch.setenv(name, value)
        project = Project(Path.cwd())
        project.save("model", "stacked")
        yield project
    os.chdir(before)


def compare(project: Project, tasks: Tasks, kinds: list[str]) -> None:
    from stacklm.evaluate.lm_eval import StackLM

    settings = {"tokenizer": str(project.tokenizer), "device": "cpu", "threads": 1}
    found = [tasks.lm_eval(StackLM(str(project.root / "model"), **settings, batch_size=size)) for size in (1, 64)]
    scorer = Scorer.load(CONFIG, project.root / "model", project.tokenizer)
    ours = run_benchmarks(scorer, [tasks.benchmark(kind) for kind in kinds])
    for kind in kinds:
        items = read_items(tasks.benchmark(kind))
        for results in found:
            samples = sorted(results["samples"][f"local_{kind}"], key=lambda one: one["doc_id"])
            assert len(samples) == len(items)
            for item, sample in zip(items, samples, strict=True):
                theirs = [one[0] if kind != "wikitext" else (one[0], None) for one in sample["resps"]]
                if kind == "wikitext":
                    assert [total for total, _ in scorer.answer(item)] == [total for total, _ in theirs]
                else:
                    assert scorer.answer(item) == [tuple(one) for one in theirs]
            for theirs, name in METRICS[kind].items():
                value = results["results"][f"local_{kind}"][f"{theirs},none"]
                assert ours[kind]["scores"][name]["value"] == pytest.approx(value, rel=1e-12)


def test_both_agree_on_every_item(project, tmp_path):
    rows = {"blimp": PAIRS, "lambada": PASSAGES, "wikitext": [{"page": page} for page in PAGES], "multiple_choice": QUESTIONS}
    compare(project, Tasks(tmp_path, rows), list(rows))


@pytest.mark.slow
def test_both_agree_on_real_items(project, tmp_path):
    if not SHARED.is_dir():
        pytest.skip(f"no real data at {SHARED}; set STACKLM_SHARED")
    rows: dict[str, list[dict]] = {}
    for kind, name in LINES.items():
        with opened(SHARED / name, account := Account()) as file:
            rows[kind] = [row for _, row in json_rows(file, name, account)][:: 1000 if kind == "blimp" else 200]
    articles = read_items(Benchmark("wikitext", str(SHARED / "wikitext-2/wiki.test.raw")))
    (text,) = read_file(SHARED / "wikitext-2/wiki.test.raw", "", 0, Account())
    pages = [f" = {page[:-1]}" for page in re.split(r"(?m)^ = (?=[^=].* = $)", text.decode())[1:3]]
    rows["wikitext"] = [{"page": page} for page in pages]
    compare(project, Tasks(tmp_path, rows), list(rows))
    assert [detokenize(page) for page in pages] == [item.continuations[0] for item in articles[:2]]


def test_lm_evals_own_detokenizer_makes_the_same_text():
    from lm_eval.tasks.wikitext.preprocess_wikitext import wikitext_detokenizer

    marks = [old if isinstance(old, str) else text for old, _ in DETOKENIZE for text in (" ( a ) [ b ] { c } \" d \" ' e ' ",)]
    text = "".join(f"word{mark}word " for mark in marks)
    assert detokenize(text) == wikitext_detokenizer({"page": text})


def test_the_entry_point_names_the_model():
    from lm_eval.api import registry

    from stacklm.evaluate.lm_eval import StackLM

    (entry,) = importlib.metadata.entry_points(group="lm_eval.models", name="stacklm")
    models: registry.Registry = registry.Registry("model")
    # As lm-eval does with what it discovers; by its text, since the entry is of another class once importlib_metadata is imported.
    models.register("stacklm", target=entry.value)
    assert models.get("stacklm") is StackLM


def test_continuations_end_at_the_first_text_that_stops_them(project):
    from lm_eval.api.instance import Instance

    from stacklm.evaluate.lm_eval import StackLM

    model = StackLM(str(project.root / "model"), str(project.tokenizer), device="cpu", threads=1)

    def continued(**settings: Any) -> str:
        (text,) = model.generate_until([Instance("generate_until", {}, ("the", {"max_gen_toks": 40, **settings}), 0)])
        return text

    whole = continued(until=[])
    assert len(whole) > 8
    assert continued(until=[whole[5], "absent"]) == whole[: whole.index(whole[5])]
    drawn = {"do_sample": True, "temperature": 1, "top_k": 5}
    assert continued(**drawn) == continued(**drawn) != whole
    with pytest.raises(ValueError, match=r"gen_kwargs.beams: unknown key"):
        continued(beams=4)


@pytest.mark.slow
def test_the_command_scores_a_model(project, tmp_path):
    Tasks(tmp_path, {"blimp": PAIRS})
    arguments = f"path={project.root}/model,tokenizer={project.tokenizer},threads=1"
    command = ["-m", "stacklm.evaluate.lm_eval", "--model", "stacklm", "--model_args", arguments, "--tasks", "local_blimp"]
    done = subprocess.run(
        [sys.executable, *command, "--include_path", str(tmp_path), "--device", "cpu", "--output_path", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    (results,) = (tmp_path / "out").rglob("results_*.json")
    assert json.loads(results.read_text())["results"]["local_blimp"]["acc,none"] == pytest.approx(
        run_benchmarks(
            Scorer.load(CONFIG, project.root / "model", project.tokenizer), [Benchmark("blimp", f"{tmp_path}/blimp.jsonl")]
        )["blimp"]["scores"]["accuracy"]["value"]
    )
