import dataclasses
from pathlib import Path

from stacklm.config.model import Dense, FactoredAttention, Stack, Stacked
from stacklm.config.optimizer import Muon
from stacklm.report import tables
from stacklm.report.comparison import build_comparison
from support.report_files import MANIFEST, MODELS, TRAIN


def cells(table):
    return {row[0]: row[1:] for rows in table.groups.values() for row in rows}


def test_results_are_readable(comparison, results):
    rows = cells(tables.results(comparison))
    assert rows["test, loss (nats per token)"] == ["3.3600", "3.2700"]
    assert rows["training tokens"] == ["614 k", "614 k"]
    assert rows["training, in total"] == ["1.97 TFLOP", "1.97 TFLOP"]
    assert rows["stacks or layers in sequence"] == ["2", "4"]
    speeds = cells(tables.speeds(results))
    assert speeds["training time"] == ["1 min 32 s", "2 min 4 s"]
    assert speeds["peak memory"] == ["1 GB", "1 GB"]
    assert "peak memory of the GPU" not in speeds


def test_what_was_not_measured_is_said_so(results):
    rows = cells(tables.speeds([results[0], dataclasses.replace(results[1], timing=[])]))
    assert rows["training time"] == ["1 min 32 s", "not measured"]
    assert rows["tokens per second"][1] == rows["peak memory"][1] == "not measured"


def test_memory_of_a_gpu_has_a_row_of_its_own(results):
    on_gpu = dataclasses.replace(results[0], timing=[{**row, "gpu_memory_bytes": 2_500_000_000} for row in results[0].timing])
    assert cells(tables.speeds([on_gpu, results[1]]))["peak memory of the GPU"] == ["2.5 GB", "not measured"]


def test_every_table_has_a_cell_for_every_column(comparison, results):
    made = [tables.results(comparison), tables.speeds(results)]
    made += [make(comparison) for make in (tables.differences, tables.matching, tables.optimizers, tables.provenance)]
    for table in made:
        for row in (row for rows in table.groups.values() for row in rows):
            assert len(row) == 1 + len(table.columns)


def test_differences_and_mismatches_carry_signs(comparison):
    assert cells(tables.differences(comparison))["test, loss (nats per token)"] == ["+0.0900"]
    matched = cells(tables.matching(comparison))
    assert matched["training tokens"] == ["0%"]
    assert matched["body parameters"][0].endswith("%, not matched")


def test_a_perplexity_too_large_for_a_number_is_said_so(results):
    results[0].evaluation["test"]["word_perplexity"] = None
    comparison = build_comparison(results, TRAIN, MANIFEST, data_sha256="")
    assert cells(tables.results(comparison))["test, perplexity per word"][0] == "too large"
    assert comparison["differences"]["stacked"]["test"]["word_perplexity"] is None


def test_provenance_shows_the_hashes_and_the_settings(comparison):
    rows = cells(tables.provenance(comparison))
    assert rows["data, SHA-256 of the manifest"] == ["ab" * 32]
    assert rows["train text"] == ["7.2 MB, 412 documents, 2.03 M tokens"]
    assert rows["lr_schedule"] == ["cosine"]
    assert cells(tables.optimizers(comparison))["peak_lr"] == ["0.002", "0.002"]


def test_optimizers_of_different_kinds_stand_side_by_side(results):
    muon = dataclasses.replace(MODELS["dense"], optimizer=Muon(peak_lr=3e-3))
    mixed = [result if result.name != "dense" else dataclasses.replace(result, model=muon) for result in results]
    rows = cells(tables.optimizers(build_comparison(mixed, TRAIN, MANIFEST, data_sha256="")))
    assert rows["kind"] == ["adamw", "muon"]
    assert rows["peak_lr"] == ["0.002", "0.003"]
    assert rows["momentum"] == ["-", "0.95"]
    assert rows["adamw.peak_lr"] == ["-", "0.001"]
    assert rows["optimizer_in_backward"] == ["False", "False"]


def test_architectures_in_one_line():
    assert tables.describe(MODELS["stacked"].architecture).startswith("2 stacks of 8 x 8 + 8 x 16")
    varied = Stacked(16, 2, (Stack(2, 8, 8),), attention=FactoredAttention(rope=True), residual=True)
    assert tables.describe(varied).endswith("2 heads per layer, factored attention, rope: true, residual: true")
    assert (
        tables.describe(Dense(64, 1, 1, 256, tie_embeddings=True))
        == "1 dense layer of width 64, 1 head, feed-forward 256 (relu2), tied head"
    )


def test_the_summary_is_a_table_the_finding_and_where_to_look(comparison):
    lines = tables.summary(comparison, Path("out/report")).splitlines()
    rows = [line.split() for line in lines[2:4]]
    bits = [f"{facts['test']['bits_per_byte']:.4f}" for facts in comparison["models"].values()]
    assert [(row[0], row[-1]) for row in rows] == list(zip(comparison["models"], bits, strict=True))
    assert comparison["finding"] in lines
    assert str(Path("out/report/index.html")) in lines[-2]
    assert "stacklm ui" in lines[-1]
