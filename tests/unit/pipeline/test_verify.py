"""What must be equal when a trial is trained again, and under which conditions."""

from __future__ import annotations

import pytest

from stacklm.config.schema import ParamsError
from stacklm.pipeline.verify import Verification, cheapest, find
from support.lab_records import course, make_lab, recorded

RECORD = {
    "valid": {"bits_per_byte": 2.0},
    "test": {"bits_per_byte": 2.1},
    "groups": {"nats": "1.00 2.00", "bytes": "3 4"},
    "weights": "ab" * 32,
}
OTHER = ("kernels is now AVX2, was AVX512",)


def verification(again: dict, *others: str) -> Verification:
    return Verification("one", RECORD, {**RECORD, **again}, others, sigma=0.002)


@pytest.mark.parametrize(
    "change",
    [
        {"weights": "cd" * 32},
        {"test": {"bits_per_byte": 2.1 + 1e-15}},
        {"valid": {"bits_per_byte": 2.0 + 1e-15}},
        {"groups": {"nats": "1.00 2.01", "bytes": "3 4"}},
        {"failed": "diverged"},
    ],
)
def test_on_an_equal_machine_every_bit_counts(change):
    assert verification({}).passed and "bit for bit" in verification({}).text()
    assert not verification(change).passed and "NOT reproduced" in verification(change).text()


@pytest.mark.parametrize(("factor", "passed"), [(1.005, True), (0.995, True), (1.007, False), (0.993, False)])
def test_on_another_machine_scores_agree_within_three_standard_deviations(factor, passed):
    found = verification({"weights": "cd" * 32, "test": {"bits_per_byte": 2.1 * factor}}, *OTHER)
    assert found.passed is passed
    assert "within 0.60% (3 standard deviations over seeds), since kernels is now AVX2, was AVX512" in found.text()


def test_weights_that_are_equal_although_they_need_not_be_are_told():
    equal, other = verification({}, *OTHER), verification({"weights": "cd" * 32}, *OTHER)
    assert "the weights are bit-identical" in equal.text() and "bit-identical" not in other.text()


def test_a_trial_that_diverged_must_diverge_again():
    failed = Verification("one", {"failed": "diverged"}, {"failed": "diverged: NaN"}, (), 0.002)
    assert failed.passed
    assert not Verification("one", {"failed": "diverged"}, RECORD, OTHER, 0.002).passed


def test_the_cheapest_trial_is_the_first_judged_one_of_the_fewest_operations():
    lab = make_lab()
    records, done = course(lab, record=recorded)
    found = cheapest("one", done, records)
    judged = [one for one in done if one.purpose == "judge"]
    assert found.purpose == "judge" and found.arm.size == 1
    assert records[found.trial.identity]["flops"] == min(records[one.trial.identity]["flops"] for one in judged)
    assert find("one", done, records, found.trial.identity[:12]) == found
    older = records | {found.trial.identity: {**records[found.trial.identity], "identity": "made before"}}
    assert find("one", done, older, "made be") == found
    failed = records | {found.trial.identity: {"failed": "diverged"}}
    assert cheapest("one", done, failed) != found
    with pytest.raises(ParamsError, match="no trial has been judged yet"):
        cheapest("one", [one for one in done if one.purpose == "tune"], records)
