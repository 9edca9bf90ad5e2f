import csv
import io
import math

import pytest

from stacklm.model.count import count
from stacklm.report.comparison import (
    MOST_NUMBERS,
    STATEMENT,
    build_comparison,
    caveats,
    curve,
    headline,
    unmatched,
)
from support.report_files import MANIFEST, MODELS, TRAIN, Folders


def build(tmp_path, **floors: float):
    results = Folders(tmp_path, floors).results({name: MODELS[name] for name in floors})
    return build_comparison(results, TRAIN, MANIFEST, data_sha256="")


def test_facts_are_those_of_the_counts_and_the_files(comparison):
    facts = comparison["models"]["stacked"]
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


def test_the_training_loss_is_a_mean_over_the_last_steps(results, comparison):
    late = [row["train_loss"] for row in results[0].metrics if row["step"] > 285]
    assert len(late) == 15
    assert comparison["models"]["stacked"]["train_loss"] == pytest.approx(sum(late) / 15)


def test_the_baseline_is_the_dense_model_and_differences_are_against_it(comparison):
    assert comparison["baseline"] == "dense"
    assert list(comparison["differences"]) == list(comparison["mismatch"]) == ["stacked"]
    assert comparison["differences"]["stacked"]["test"]["loss"] == pytest.approx(0.09)
    assert comparison["mismatch"]["stacked"]["tokens"] == 0
    both = comparison["models"]
    assert comparison["mismatch"]["stacked"]["body_parameters"] == pytest.approx(
        both["stacked"]["body_parameters"] / both["dense"]["body_parameters"] - 1
    )


def test_without_a_dense_model_the_first_is_the_baseline(folders):
    folders.write_model("second", MODELS["stacked"], 3.3, seconds=50)
    results = folders.results({name: MODELS["stacked"] for name in ("stacked", "second")})
    assert build_comparison(results, TRAIN, MANIFEST, "")["baseline"] == "stacked"


def test_the_finding_gives_a_direction_its_price_and_no_verdict(comparison):
    fewer = round(-100 * comparison["mismatch"]["stacked"]["body_parameters"])
    assert "stacked needs 2.8% more bits per byte than dense" in comparison["finding"]
    assert f", with {fewer}% fewer body parameters. " in comparison["finding"]  # equal training FLOPs are not worth a word
    assert comparison["finding"].endswith("One seed: a direction, not a result.")
    assert comparison["statement"] == STATEMENT


@pytest.mark.parametrize(
    ("floors", "finding"),
    [
        ({"stacked": 3.224, "dense": 3.22}, "stacked shows no difference from dense"),
        ({"stacked": 3.214, "dense": 3.22}, "stacked needs 0.2% fewer"),
        ({"dense": 3.22}, "there is no other model to compare it with"),
    ],
)
def test_models_closer_than_the_smallest_difference_are_not_told_apart(tmp_path, floors, finding):
    comparison = build(tmp_path, **floors)
    assert finding in comparison["finding"]
    assert list(comparison["differences"]) == list(comparison["mismatch"]) == [name for name in floors if name != "dense"]


def test_provenance_says_where_the_numbers_come_from(comparison):
    origin = comparison["provenance"]
    assert origin["seed"] == 1
    assert origin["data_sha256"] == "ab" * 32
    assert origin["tokenizer_sha256"] == MANIFEST["tokenizer"]
    assert origin["train"]["max_steps"] == 300
    assert origin["models"]["dense"]["optimizer"]["peak_lr"] == 2e-3
    assert origin["splits"]["train"] == {"documents": 412, "bytes": 7_204_113, "words": 801_340, "tokens": 2_034_112}


def test_unmatched_names_the_axes_that_are_too_far_apart():
    assert unmatched({"total_parameters": -0.2, "tokens": 0.0, "training_flops": 0.051, "body_parameters": 0.05}) == {
        "parameters": -0.2,
        "training FLOPs": 0.051,
    }


def test_caveats_say_seed_and_how_each_model_is_matched():
    mismatch = {"stacked": {"tokens": 0.0, "total_parameters": 0.3}, "wide": {"tokens": 0.01}}
    notes = caveats({"baseline": "dense", "mismatch": mismatch, "provenance": {"seed": 7}})
    assert "seed 7" in notes[0]
    assert notes[-2] == "stacked is not matched to dense in parameters (+30.0%)."
    assert notes[-1] == "wide is matched to dense within 5% in parameters, compute and tokens."


@pytest.mark.parametrize(("models", "numbers"), [(2, 12), (7, 28), (40, 30)])
def test_the_headline_has_at_most_thirty_numbers(comparison, models, numbers):
    facts = comparison["models"]["dense"]
    found = headline({"models": {f"m{i}": facts for i in range(models)}})
    assert sum(map(len, found.values())) == numbers <= MOST_NUMBERS
    assert all(entry["test_bits_per_byte"] == facts["test"]["bits_per_byte"] for entry in found.values())


def test_a_curve_has_a_row_for_each_validation_with_the_mean_training_loss_since_the_last(results):
    rows = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(io.StringIO(curve(results[0])))]
    metrics = results[0].metrics
    assert [row["step"] for row in rows] == list(range(TRAIN.eval_every, TRAIN.max_steps + 1, TRAIN.eval_every))
    for row in rows:
        step = int(row["step"])
        assert row["valid_loss"] == metrics[step]["valid_loss"]
        losses = [metrics[i]["train_loss"] for i in range(step - TRAIN.eval_every + 1, step + 1)]
        assert math.isclose(row["train_loss"], sum(losses) / len(losses), rel_tol=len(losses) * 2.0**-52)
