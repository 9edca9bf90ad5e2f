"""`stacklm family` as a user runs it; nothing needs to be trained."""

from __future__ import annotations

from conftest import Checkout


def test_a_family_is_made_around_a_model_or_a_preset(fresh: Checkout) -> None:
    text = fresh.stacklm("family")
    assert "vocabulary 300, context 16" in text and "as many parameters" in text
    assert text == fresh.stacklm("family", "--model", "stacked")
    assert " 436,967,344 " in fresh.stacklm("family", "--preset", "seed-2x64", "--axis", "flops")


def test_what_has_no_family_is_one_clear_message(fresh: Checkout) -> None:
    assert "dense is no stacked model" in fresh.stacklm("family", "--model", "dense", check=False)
    assert "no model 'dens'" in fresh.stacklm("family", "--model", "dens", check=False)
    assert "no preset 'x'; choose one of seed-2x64, seed-4x8" in fresh.stacklm("family", "--preset", "x", check=False)
