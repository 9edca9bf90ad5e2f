from stacklm.report.wording import caveats, title


def comparison(mismatch):
    return {
        "baseline": "dense",
        "models": {"stacked": {}, "wide": {}, "dense": {}},
        "mismatch": mismatch,
        "provenance": {"seed": 7},
    }


def test_titles_name_the_models():
    assert title(comparison({})) == "stacked, wide and dense, side by side"
    assert title({"models": {"dense": {}}}) == "dense, on its own"


def test_caveats_say_seed_and_how_each_model_is_matched():
    notes = caveats(comparison({"stacked": {"tokens": 0.0, "total_parameters": 0.3}, "wide": {"tokens": 0.01}}))
    assert "seed 7" in notes[0]
    assert notes[-2] == "stacked is not matched to dense in parameters (+30.0%)."
    assert notes[-1] == "wide is matched to dense within 5% in parameters, compute and tokens."
