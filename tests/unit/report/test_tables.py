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
    assert rows["serial depth (stacks or layers)"] == ["2", "4"]


def test_speeds_are_means_over_seeds_and_the_highest_of_peaks(results):
    stacked, dense = results
    slower = dataclasses.replace(stacked, timing=[{**row, "seconds": 2 * row["seconds"]} for row in stacked.timing])
    rows = cells(tables.speeds([stacked, dataclasses.replace(stacked, timing=[]), slower, dense]))
    assert rows["training time"] == ["2 min 19 s", "2 min 4 s"]  # of 92.4 and 184.8 s
    assert rows["tokens per second"] == [f"{300 * 2048 * (1 / 92.4 + 1 / 184.8) / 2 / 1000:.3g} k", "4.95 k"]
    assert rows["peak memory"] == ["1 GB", "1 GB"] and "peak GPU memory" not in rows
    on_gpu = dataclasses.replace(stacked, timing=[{**row, "gpu_memory_bytes": 5_000_000 * row["step"]} for row in stacked.timing])
    rows = cells(tables.speeds([on_gpu, dataclasses.replace(dense, timing=[])]))
    assert rows["peak GPU memory"] == ["1.5 GB", "not measured"]
    assert [row[1] for row in rows.values()] == ["not measured"] * 4


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
    assert (rows["lr_schedule"], rows["compile"], rows["max_steps"]) == (["cosine"], ["False"], ["300"])
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
