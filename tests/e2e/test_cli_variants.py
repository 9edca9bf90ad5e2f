"""`stacklm variants` as a user runs it; nothing needs to be trained."""

from __future__ import annotations

from support.checkout import Checkout


def test_a_family_is_made_around_a_model_or_a_preset(fresh: Checkout) -> None:
    text = fresh.cli("variants")
    assert "vocabulary 300, context 16" in text and "as many parameters" in text
    assert text == fresh.cli("variants", "--model", "stacked")
    assert " 436,967,344 " in fresh.cli("variants", "--preset", "seed-2x64", "--axis", "flops")


def test_what_has_no_family_is_one_clear_message(fresh: Checkout) -> None:
    assert "dense is not a stacked model" in fresh.cli("variants", "--model", "dense", code=2)
    assert "no model 'dens'" in fresh.cli("variants", "--model", "dens", code=2)
    assert "no preset 'x'; choose one of seed-2x64, seed-4x8" in fresh.cli("variants", "--preset", "x", code=2)
