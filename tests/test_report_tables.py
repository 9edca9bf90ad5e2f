import dataclasses

import pytest
from report_files import MANIFEST, MODELS, TRAIN, Folders

from stacklm.config.model import Dense, FoldedAttention, Stack, Stacked
from stacklm.config.optimizer import Muon
from stacklm.report import tables
from stacklm.report.comparison import build_comparison


@pytest.fixture
def runs(tmp_path):
    return Folders(tmp_path, {"stacked": 3.31, "dense": 3.22}).runs()


@pytest.fixture
def comparison(runs):
    return build_comparison(runs, TRAIN, MANIFEST, data_sha256="ab" * 32)


def cells(table):
    return {row[0]: row[1:] for rows in table.groups.values() for row in rows}


def test_results_are_readable(comparison, runs):
    rows = cells(tables.results(comparison, runs))
    assert rows["test, loss (nats per token)"] == ["3.3600", "3.2700"]
    assert rows["training tokens"] == ["614 k", "614 k"]
    assert rows["training, in total"] == ["1.97 TFLOP", "1.97 TFLOP"]
    assert rows["training time"] == ["1 min 32 s", "2 min 4 s"]
    assert rows["peak memory"] == ["1 GB", "1 GB"]
    assert rows["stacks or layers in sequence"] == ["2", "4"]
    assert "peak memory of the GPU" not in rows


def test_what_was_not_measured_is_said_so(comparison, runs):
    rows = cells(tables.results(comparison, [runs[0], dataclasses.replace(runs[1], timing=[])]))
    assert rows["training time"] == ["1 min 32 s", "not measured"]
    assert rows["tokens per second"][1] == rows["peak memory"][1] == "not measured"


def test_memory_of_a_gpu_has_a_row_of_its_own(comparison, runs):
    on_gpu = dataclasses.replace(runs[0], timing=[{**row, "gpu_memory_bytes": 2_500_000_000} for row in runs[0].timing])
    assert cells(tables.results(comparison, [on_gpu, runs[1]]))["peak memory of the GPU"] == ["2.5 GB", "not measured"]


def test_every_table_has_a_cell_for_every_column(comparison, runs):
    made = [tables.results(comparison, runs)]
    made += [make(comparison) for make in (tables.differences, tables.matching, tables.optimizers, tables.provenance)]
    for table in made:
        for row in (row for rows in table.groups.values() for row in rows):
            assert len(row) == 1 + len(table.columns)


def test_differences_and_mismatches_carry_signs(comparison):
    assert cells(tables.differences(comparison))["test, loss (nats per token)"] == ["+0.0900"]
    matched = cells(tables.matching(comparison))
    assert matched["training tokens"] == ["0%"]
    assert matched["body parameters"][0].endswith("%, not matched")


def test_a_perplexity_too_large_for_a_number_is_said_so(runs):
    runs[0].evaluation["test"]["word_perplexity"] = None
    comparison = build_comparison(runs, TRAIN, MANIFEST, data_sha256="")
    assert cells(tables.results(comparison, runs))["test, perplexity per word"][0] == "too large"
    assert comparison["differences"]["stacked"]["test"]["word_perplexity"] is None


def test_provenance_shows_the_hashes_and_the_settings(comparison):
    rows = cells(tables.provenance(comparison))
    assert rows["data, SHA-256 of the manifest"] == ["ab" * 32]
    assert rows["train text"] == ["7.2 MB, 412 documents, 2.03 M tokens"]
    assert rows["schedule"] == ["cosine"]
    assert cells(tables.optimizers(comparison))["peak_lr"] == ["0.002", "0.002"]


def test_optimizers_of_different_kinds_stand_side_by_side(runs):
    muon = dataclasses.replace(MODELS["dense"], optimizer=Muon(peak_lr=3e-3))
    mixed = [run if run.name != "dense" else dataclasses.replace(run, model=muon) for run in runs]
    rows = cells(tables.optimizers(build_comparison(mixed, TRAIN, MANIFEST, data_sha256="")))
    assert rows["kind"] == ["adamw", "muon"]
    assert rows["peak_lr"] == ["0.002", "0.003"]
    assert rows["momentum"] == ["-", "0.95"]
    assert rows["rest.peak_lr"] == ["-", "0.001"]
    assert rows["in_backward"] == ["False", "False"]


def test_architectures_in_one_line():
    assert tables.describe(MODELS["stacked"].architecture).startswith("2 stacks of 8 x 8 + 8 x 16")
    varied = Stacked(16, 2, (Stack(2, 8, 8),), attention=FoldedAttention(rotary=True), join="residual")
    assert tables.describe(varied).endswith("2 heads a layer, folded attention, rotary: True, join: residual")
    assert (
        tables.describe(Dense(64, 1, 1, 256, tied=True)) == "1 dense layer of width 64, 1 head, feed-forward 256 (relu2), tied head"
    )
