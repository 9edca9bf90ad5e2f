import pytest
from report_files import MANIFEST, MODELS, TRAIN, Folders

from stacklm.model.count import count
from stacklm.report.comparison import STATEMENT, build_comparison, unmatched


def build(tmp_path, floors=None, models=MODELS):
    runs = Folders(tmp_path, floors or {"stacked": 3.31, "dense": 3.22}).runs(models)
    return build_comparison(runs, TRAIN, MANIFEST, data_sha256="ab" * 32)


def test_facts_are_those_of_the_counts_and_the_files(tmp_path):
    facts = build(tmp_path)["models"]["stacked"]
    counts = count(MODELS["stacked"].architecture, 2048, 128)
    assert facts["parameters"] == counts.parameters
    assert facts["total_parameters"] == counts.total == sum(facts["parameters"].values())
    assert facts["body_parameters"] == counts.total - counts.parameters["embedding"] - counts.parameters["head"]
    assert facts["training_flops_per_token"] == counts.training_flops_per_token
    assert facts["tokens"] == 300 * 2048
    assert facts["training_flops"] == 300 * 2048 * 3_200_000
    assert facts["epochs"] == pytest.approx(300 * 2048 / 2_034_112)
    assert facts["sequential_depth"] == 2
    assert facts["test"]["loss"] == pytest.approx(3.36)


def test_the_training_loss_is_a_mean_over_the_last_steps(tmp_path):
    folders = Folders(tmp_path, {"stacked": 3.31, "dense": 3.22})
    runs = folders.runs()
    late = [row["train_loss"] for row in runs[0].metrics if row["step"] > 285]
    assert len(late) == 15
    facts = build_comparison(runs, TRAIN, MANIFEST, "")["models"]["stacked"]
    assert facts["train_loss"] == pytest.approx(sum(late) / 15)


def test_the_baseline_is_the_dense_model_and_differences_are_against_it(tmp_path):
    comparison = build(tmp_path)
    assert comparison["baseline"] == "dense"
    assert list(comparison["differences"]) == list(comparison["mismatch"]) == ["stacked"]
    assert comparison["differences"]["stacked"]["test"]["loss"] == pytest.approx(0.09)
    assert comparison["mismatch"]["stacked"]["tokens"] == 0
    both = comparison["models"]
    assert comparison["mismatch"]["stacked"]["body_parameters"] == pytest.approx(
        both["stacked"]["body_parameters"] / both["dense"]["body_parameters"] - 1
    )


def test_without_a_dense_model_the_first_is_the_baseline(tmp_path):
    folders = Folders(tmp_path, {"stacked": 3.31})
    folders.write_model("second", MODELS["stacked"], 3.3, seconds=50)
    runs = folders.runs({"stacked": MODELS["stacked"], "second": MODELS["stacked"]})
    assert build_comparison(runs, TRAIN, MANIFEST, "")["baseline"] == "stacked"


def test_the_finding_gives_a_direction_its_price_and_no_verdict(tmp_path):
    comparison = build(tmp_path)
    fewer = round(-100 * comparison["mismatch"]["stacked"]["body_parameters"])
    assert "stacked needs 2.8% more bits per byte than dense" in comparison["finding"]
    assert f", with {fewer}% fewer body parameters. " in comparison["finding"]  # equal training FLOPs are not worth a word
    assert comparison["finding"].endswith("One seed: a direction, not a result.")
    assert comparison["statement"] == STATEMENT


def test_models_closer_than_the_smallest_difference_are_not_told_apart(tmp_path):
    close = build(tmp_path / "close", {"stacked": 3.224, "dense": 3.22})
    apart = build(tmp_path / "apart", {"stacked": 3.214, "dense": 3.22})
    assert "stacked shows no difference from dense" in close["finding"]
    assert "stacked needs 0.2% fewer" in apart["finding"]


def test_a_single_model_is_compared_with_nothing(tmp_path):
    comparison = build(tmp_path, {"dense": 3.22}, {"dense": MODELS["dense"]})
    assert comparison["differences"] == comparison["mismatch"] == {}
    assert "no other model" in comparison["finding"]


def test_provenance_says_where_the_numbers_come_from(tmp_path):
    origin = build(tmp_path)["provenance"]
    assert origin["seed"] == 1
    assert origin["data_sha256"] == "ab" * 32
    assert origin["tokenizer_sha256"] == MANIFEST["tokenizer"]
    assert origin["train"]["steps"] == 300
    assert origin["models"]["dense"]["optimizer"]["peak_lr"] == 2e-3
    assert origin["splits"]["train"] == {"documents": 412, "bytes": 7_204_113, "words": 801_340, "tokens": 2_034_112}


def test_unmatched_names_the_axes_that_are_too_far_apart():
    assert unmatched({"total_parameters": -0.2, "tokens": 0.0, "training_flops": 0.051, "body_parameters": 0.05}) == {
        "parameters": -0.2,
        "training FLOPs": 0.051,
    }
