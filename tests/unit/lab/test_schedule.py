"""The whole course of an experiment, with made-up scores instead of training runs."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from stacklm.config.schema import plain
from stacklm.lab.findings import Findings
from stacklm.lab.schedule import Lab, Planned
from stacklm.lab.statistics import ALPHA, sequential_level
from stacklm.lab.text import plan_text, result_text
from support.lab_records import BEST, TRUTH, course, make_lab, measured


@pytest.fixture(scope="module")
def lab() -> Lab:
    return make_lab()


def test_rates_are_bracketed_then_every_arm_is_judged_with_its_best(lab):
    records, done = course(lab)
    for size in (1.0, 2.0):
        mine = [planned for planned in done if planned.arm.size == size]
        assert [planned.purpose for planned in mine] == sorted((planned.purpose for planned in mine), reverse=True)
        tuned = {name: sum(p.arm.name == name and p.purpose == "tune" for p in mine) for name in TRUTH}
        assert len({*tuned.values()}) == 1 and tuned["worse"] > 5 * 2  # its best lay outside of the first five rates
        result = lab.result(records, size)
        assert result.seeds == (1, 2, 3, 4, 5, 6, 7, 8) and result.left_out == ()
        for name, best in BEST.items():
            # noise of the tuning seeds is common to all rates of an arm, so the parabola is exact
            assert result.rates[name] == pytest.approx(best, rel=1e-6)
        outcomes = {name: verdict.outcome for name, verdict in result.verdicts.items()}
        assert outcomes == {"better": "better", "equal": "not worse", "worse": "worse"}
        for name, verdict in result.verdicts.items():
            assert verdict.low < TRUTH[name] / 2 - 1 < verdict.high
        assert all(result.pairing(name) < 1 for name in outcomes)  # the seeds' common noise cancels
        assert 0 < result.sigma < 0.02 and result.detectable > result.sigma
        assert result.against_itself.pairs == 4 and 0 <= result.against_itself.false_wins <= 8 * ALPHA


@pytest.mark.parametrize(("factor", "same"), [(1 + 1e-9, True), (1 - 1e-8, True), (1 + 1e-4, False)])
def test_records_of_a_processor_that_rounds_learning_rates_differently_count(lab, factor, same):
    records, done = course(lab)
    elsewhere = {}
    for planned in done:
        trial = planned.trial
        if planned.purpose == "judge":
            trial = lab.trial(planned.arm, factor * trial.model.optimizer.peak_lr, trial.train.seed)
        elsewhere[trial.identity] = records[planned.trial.identity] | {"model": plain(trial.model)}
    found, expected = lab.result(elsewhere, 1.0), lab.result(records, 1.0)
    assert bool(found) == same == (not lab.pending(elsewhere))
    if found:
        assert found.scores == expected.scores and found.rates == pytest.approx(expected.rates, rel=1e-7)
        assert found.rates != expected.rates  # those that the trials were trained with


def test_the_order_of_work_changes_nothing(lab):
    one, several = course(lab)[0], course(lab, at_once=7)[0]
    assert one == several


def test_nothing_is_trained_twice_after_an_interruption(lab):
    records, done = course(lab)
    half = {planned.trial.identity: records[planned.trial.identity] for planned in done[: len(done) // 2]}
    rest = lab.pending(half)
    assert rest and not {planned.trial.identity for planned in rest} & half.keys()
    assert lab.result(half, 2.0) is None


def test_a_failed_trial_stops_no_other_and_its_seed_is_left_out(lab):
    def record(planned: Planned) -> dict:
        if planned.arm.name == "equal" and planned.trial.train.seed == 3:
            return {"failed": "killed"}
        if planned.purpose == "tune" and planned.trial.model.optimizer.peak_lr > 3e-2:
            return {"failed": "diverged"}
        return measured(planned)

    records, _ = course(lab, record=record)
    result = lab.result(records, 1.0)
    assert result.left_out == (3,) and 3 not in result.seeds and len(result.seeds) == 7
    assert result.verdicts["better"].outcome == "better"


def test_the_baseline_against_itself_needs_neither_candidates_nor_tuning(lab):
    seeds = replace(lab.experiment.seeds, tune=())
    alone = replace(
        lab,
        experiment=replace(lab.experiment, candidates={}, seeds=seeds),
        arms=[arm for arm in lab.arms if arm.name == "baseline"],
    )
    records, done = course(alone)
    assert {(planned.purpose, planned.trial.model.optimizer.peak_lr) for planned in done} == {("judge", 2e-3)}
    assert len(done) == 8 * 2
    result = alone.result(records, 1.0)
    assert result.verdicts == {} and result.against_itself.sd == pytest.approx(math.sqrt(2) * result.sigma, rel=0.3)
    text = result_text(Findings("one", alone, records))
    assert "A/A test of the baseline: 4 random pairs" in text
    assert "\ntrials: none for tuning, 16 for judging\ntime: all trials are done\n" in plan_text(alone, records, 1)
    assert "\ntime: unknown until the first trial has run\n" in plan_text(alone, {}, 1)


def test_an_arm_that_always_diverges_is_an_error(lab):
    with pytest.raises(ValueError, match=r"every learning rate from .* diverged"):
        course(lab, record=lambda planned: {"failed": "diverged"})


def test_names_say_what_a_trial_is(lab):
    assert lab.pending({})[0].name == "baseline size 1, lr 0.0005, seed 101"


@pytest.mark.parametrize("at_once", [1, 7])
def test_with_looks_no_seed_is_trained_after_every_candidate_is_decided(lab, at_once):
    """`worse` and `better` are decided soon; `equal`, with a margin that it needs all seeds for, is not."""
    seeds = replace(lab.experiment.seeds, looks=(3, 5, 8))

    def judged(names: set[str]) -> tuple[set[int], Lab, dict]:
        experiment = replace(
            lab.experiment, seeds=seeds, candidates={n: c for n, c in lab.experiment.candidates.items() if n in names}
        )
        some = Lab(
            experiment, [arm for arm in lab.arms if arm.name in {"baseline", *names} and arm.size == 1], lab.settings, "d", "c"
        )
        records, done = course(some, at_once)
        assert not some.pending(records)
        return {planned.trial.train.seed for planned in done if planned.purpose == "judge"}, some, records

    trained, some, records = judged({"better", "worse"})
    assert trained == {1, 2, 3}
    result = some.result(records, 1.0)
    assert {name: verdict.outcome for name, verdict in result.verdicts.items()} == {"better": "better", "worse": "worse"}
    level = sequential_level((3, 5, 8), ALPHA / 2)
    assert {verdict.level for verdict in result.verdicts.values()} == {level} and level < ALPHA / 2
    trained, some, records = judged({"equal"})
    verdict = some.result(records, 1.0).verdicts["equal"]
    assert len(trained) == verdict.seeds  # it stopped where it was decided, or at the end
    unlike = some.result(records, 1.0, seeds.judge[:3]).verdicts["equal"]
    assert len(trained) == 3 or unlike.outcome == "no verdict"
