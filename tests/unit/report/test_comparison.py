import csv
import io
import math

import numpy as np
import pytest

from stacklm.lab.statistics import verdicts
from stacklm.model.count import count
from stacklm.report.comparison import MARGIN, MOST_NUMBERS, build_comparison, caveats, curve, headline, unmatched
from support.report_files import MANIFEST, MODELS, TRAIN, Folders


def build(tmp_path, noise: dict[tuple[str, int], float] | None = None, **floors: float):
    results = Folders(tmp_path, floors, noise).results({name: MODELS[name] for name in floors})
    return build_comparison(results, TRAIN, MANIFEST, data_sha256="")


def over_seeds(*sizes: float) -> dict[tuple[str, int], float]:
    """What seeds add to the losses of `stacked`; to those of `dense` half of it."""
    sizes_by_name = {"stacked": sizes, "dense": [size / 2 for size in sizes]}
    return {(name, seed): size for name, all_ in sizes_by_name.items() for seed, size in enumerate(all_, start=1)}


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
    assert comparison["finding"].endswith("One seed: indicative only, no verdict.")


def test_a_verdict_rests_on_differences_of_the_same_seed(tmp_path):
    comparison = build(tmp_path, over_seeds(0.0, 0.02, -0.01, 0.03), stacked=3.31, dense=3.22)
    stacked, dense = (
        np.array([one["test"] for one in comparison["models"][name]["seeds"].values()]) for name in ("stacked", "dense")
    )
    (pair,) = comparison["pairs"]
    expected = verdicts({"pair": stacked / dense - 1}, MARGIN)["pair"]
    assert (pair["model"], pair["against"], pair["seeds"]) == ("stacked", "dense", 4)
    assert [pair[key] for key in ("mean", "low", "high", "outcome")] == [
        expected.mean, expected.low, expected.high, expected.outcome,
    ]  # fmt: skip
    assert expected.outcome == "worse" and comparison["best"] == "dense"
    facts = comparison["models"]["stacked"]
    assert facts["test"]["bits_per_byte"] == pytest.approx(stacked.mean())
    assert facts["test_sd"] == pytest.approx(stacked.std(ddof=1))
    assert comparison["provenance"]["seeds"] == [1, 2, 3, 4]
    assert "over 4 seeds: stacked needs 2.9% more bits per byte than dense" in comparison["finding"]
    assert f"interval {pair['low']:+.1%} to {pair['high']:+.1%}): worse" in comparison["finding"]
    assert "error rate 2.5% in each direction over 1 pair, margin 0.5%." in comparison["finding"]


def test_every_pair_has_a_verdict_and_the_error_rate_is_shared(tmp_path):
    noise = {**over_seeds(0.0, 0.02, -0.01), **{("second", seed): 0.001 * seed for seed in (1, 2, 3)}}
    folders = Folders(tmp_path, {"stacked": 3.31, "dense": 3.22}, over_seeds(0.0, 0.02, -0.01))
    for seed in folders.seeds:
        folders.write_model("second", MODELS["stacked"], 3.311 + noise["second", seed], seconds=50, seed=seed)
    models = {"stacked": MODELS["stacked"], "second": MODELS["stacked"], "dense": MODELS["dense"]}
    comparison = build_comparison(folders.results(models), TRAIN, MANIFEST, "")
    pairs = [(pair["model"], pair["against"]) for pair in comparison["pairs"]]
    assert pairs == [("stacked", "dense"), ("second", "dense"), ("second", "stacked")]
    assert comparison["pairs"][-1]["outcome"] == "no verdict"
    assert min(pair["level"] for pair in comparison["pairs"]) == pytest.approx(0.025 / 3)
    assert "over 3 pairs (Holm)" in comparison["finding"]


def test_a_difference_within_the_noise_is_no_verdict_and_nobody_is_the_best(tmp_path):
    comparison = build(tmp_path, over_seeds(0.3, -0.2, 0.1), stacked=3.24, dense=3.22)
    (pair,) = comparison["pairs"]
    assert pair["outcome"] == "no verdict" and pair["more_seeds"] > 0
    assert f"no verdict, {pair['more_seeds']} seeds more would probably decide" in comparison["finding"]
    assert comparison["best"] is None


def test_two_seeds_give_a_direction_and_no_verdict(tmp_path):
    comparison = build(tmp_path, over_seeds(0.01, 0.0), stacked=3.31, dense=3.22)
    assert [pair["outcome"] for pair in comparison["pairs"]] == [None]
    assert comparison["finding"].endswith("2 seeds: indicative only, no verdict.")
    assert "A verdict needs 3" in caveats(comparison)[0]


@pytest.mark.parametrize(
    ("floors", "finding", "best"),
    [
        ({"stacked": 3.31, "dense": 3.22}, "stacked needs 2.8% more", "dense"),
        ({"stacked": 3.214, "dense": 3.22}, "stacked needs 0.2% fewer", "stacked"),
        ({"stacked": 3.224, "dense": 3.22}, "stacked shows no difference from dense", None),
        ({"dense": 3.22}, "no comparison, since only one model was evaluated", None),
    ],
)
def test_with_few_seeds_models_are_told_apart_by_the_smallest_difference(tmp_path, floors, finding, best):
    comparison = build(tmp_path, **floors)
    assert finding in comparison["finding"] and comparison["best"] == best
    assert list(comparison["differences"]) == list(comparison["mismatch"]) == [name for name in floors if name != "dense"]


def test_provenance_says_where_the_numbers_come_from(comparison):
    origin = comparison["provenance"]
    assert origin["seeds"] == [1]
    assert "seed" not in origin["train"]
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
    notes = caveats({"baseline": "dense", "mismatch": mismatch, "provenance": {"seeds": [7]}})
    assert "one seed: indicative only" in notes[0]
    assert notes[-2] == "stacked is not matched to dense in parameters (+30.0%)."
    assert notes[-1] == "wide is matched to dense within 5% in parameters, compute and tokens."


@pytest.mark.parametrize(("models", "numbers"), [(2, 12), (7, 28), (40, 30)])
def test_the_headline_has_at_most_thirty_numbers(comparison, models, numbers):
    facts = comparison["models"]["dense"]
    found = headline({"models": {f"m{i}": facts for i in range(models)}})
    assert sum(map(len, found.values())) == numbers <= MOST_NUMBERS
    assert all(entry["test_bits_per_byte"] == facts["test"]["bits_per_byte"] for entry in found.values())


def test_a_curve_is_the_mean_over_seeds(tmp_path):
    runs = Folders(tmp_path, {"dense": 3.22}, {("dense", 1): 0.0, ("dense", 2): 0.1}).results({"dense": MODELS["dense"]})
    rows, *single = ([*csv.DictReader(io.StringIO(curve(some)))] for some in (runs, runs[:1], runs[1:]))
    for key in ("train_loss", "valid_loss", "valid_bits_per_byte", "step"):
        expected = [(float(a[key]) + float(b[key])) / 2 for a, b in zip(*single, strict=True)]
        assert [float(row[key]) for row in rows] == pytest.approx(expected)


def test_a_curve_has_a_row_for_each_validation_with_the_mean_training_loss_since_the_last(results):
    rows = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(io.StringIO(curve(results[:1])))]
    metrics = results[0].metrics
    assert [row["step"] for row in rows] == list(range(TRAIN.eval_every, TRAIN.max_steps + 1, TRAIN.eval_every))
    for row in rows:
        step = int(row["step"])
        assert row["valid_loss"] == metrics[step]["valid_loss"]
        losses = [metrics[i]["train_loss"] for i in range(step - TRAIN.eval_every + 1, step + 1)]
        assert math.isclose(row["train_loss"], sum(losses) / len(losses), rel_tol=len(losses) * 2.0**-52)
