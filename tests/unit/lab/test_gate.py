"""A gate is an ordinary experiment: the given model unchanged, the baseline at its budget, declared interim looks."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from stacklm.config.model import Dense, Model, Python, Stack, Stacked
from stacklm.config.optimizer import AdamW, Muon
from stacklm.config.schema import ParamsError
from stacklm.lab.experiment import arms, load_experiment, settings
from stacklm.lab.findings import Findings
from stacklm.lab.gate import Gate, Named, bar, changed, find_baseline, find_candidate, gate_experiment, of_steps, pace, written
from stacklm.lab.schedule import Lab
from stacklm.lab.statistics import Verdict, sequential_level
from stacklm.lab.text import result_text
from stacklm.report.lab.page import report
from support.checkout import PARAMS
from support.custom_models import FOLDER
from support.lab_records import lab_of

BASE = Named("dense", Model(Dense(96, 4, 5, 196, ffn="swiglu")))
MUON = Muon()
STACKED = Model(Stacked(32, 2, (Stack(4, 8, 64), Stack(4, 8, 64))))
TERMS = {"budget": "parameters", "margin": 0.005, "rates": 5, "looks": (3, 5, 8, 12), "train": None}


@pytest.mark.parametrize("budget", ["parameters", "training_flops"])
@pytest.mark.parametrize("size", [Dense(24, 1, 3, 40), Dense(96, 4, 5, 150), Dense(200, 4, 8, 700), STACKED.architecture])
def test_the_candidate_stays_as_it_is_and_the_baseline_is_brought_to_its_budget(budget, size):
    made = gate_experiment(Named("mine", Model(size)), BASE, PARAMS, **TERMS | {"budget": budget})
    baseline, mine = arms(made, PARAMS)
    assert mine.model.architecture == size and abs(mine.mismatch[budget]) < 0.01 and mine.warning is None
    dense = baseline.model.architecture
    assert dense.d_model / dense.n_heads == 24 and dense.n_layers == 5  # wider or narrower, not of another kind
    assert dense.d_model < 96 * 3 and (dense.d_ff < 4 * dense.d_model or dense.n_heads == 1)


@pytest.mark.parametrize("budget", ["tokens", "seconds"])
def test_where_shapes_are_not_held_equal_the_baseline_stays_as_it_is(budget):
    assert gate_experiment(Named("mine", STACKED), BASE, PARAMS, **TERMS | {"budget": budget}).baseline == BASE.model


def test_a_baseline_that_cannot_come_near_is_refused_with_the_numbers():
    with pytest.raises(ParamsError, match=r"baseline cannot meet the budget: the nearest is [\d,]+ parameters at d_ff 1"):
        gate_experiment(Named("mine", Model(Dense(2, 1, 1, 1))), BASE, PARAMS, **TERMS)


def test_its_file_holds_the_whole_experiment_and_no_more_than_that(tmp_path):
    terms = {"margin": 0.01, "rates": 3, "looks": (3, 4), "train": of_steps(40, PARAMS.train)}
    made = gate_experiment(Named("mine", replace(STACKED, optimizer=MUON)), BASE, PARAMS, **TERMS | terms)
    file = tmp_path / "try-mine.yaml"
    file.write_text(written(made, "by stacklm try"))
    assert load_experiment(file) == made and file.read_text().startswith("# by stacklm try\nquestion: Does mine need fewer")
    assert made.seeds.judge == (1, 2, 3, 4) and made.candidates["mine"].differs == ("architecture", "optimizer")
    assert "dropout" not in file.read_text() and "kind: stacked" in file.read_text()
    assert settings(made, PARAMS).max_steps == 40 and settings(made, PARAMS).warmup_steps == 2


def test_the_model_is_one_of_the_settings_or_that_of_a_file(tmp_path):
    assert find_candidate("stacked", PARAMS, MUON) == Named("stacked", PARAMS.models["stacked"])
    (tmp_path / "idea.yaml").write_text("architecture: {kind: dense, d_model: 8, n_heads: 1, n_layers: 1, d_ff: 8}\n")
    found = find_candidate(str(tmp_path / "idea.yaml"), PARAMS, MUON)
    assert found == Named("idea", Model(Dense(8, 1, 1, 8), MUON))
    (tmp_path / "idea.yaml").write_text((tmp_path / "idea.yaml").read_text() + "optimizer: {peak_lr: 3e-3}\n")
    assert find_candidate(str(tmp_path / "idea.yaml"), PARAMS, MUON).model.optimizer == AdamW(peak_lr=3e-3)
    with pytest.raises(ParamsError, match=r"no model 'stackd' in params.yaml.*did you mean `stacked`"):
        find_candidate("stackd", PARAMS, MUON)
    (tmp_path / "1.yaml").write_text((tmp_path / "idea.yaml").read_text())
    with pytest.raises(ParamsError, match="'1' cannot be the name of a model"):
        find_candidate(str(tmp_path / "1.yaml"), PARAMS, MUON)


def test_of_a_python_file_it_is_the_class_that_is_named_or_the_only_one_that_can_be_meant(tmp_path):
    for name, kind in {"gpt": "GPT", "lstm": "LSTM", "linear_attention": "Gated"}.items():
        file = str(FOLDER / f"{name}.py")
        wanted = Named(name, Model(Python(file, kind), MUON))
        assert find_candidate(file, PARAMS, MUON) == find_candidate(f"{file}:{kind}", PARAMS, MUON) == wanted
    two = tmp_path / "two.py"
    two.write_text("from torch import nn\n" + "".join(f"class {name}(nn.Module):\n    pass\n" for name in "AB"))
    with pytest.raises(ParamsError, match=r"two.py: has several models, A, B; name one, as two.py:B"):
        find_candidate(str(two), PARAMS, MUON)
    assert find_candidate(f"{two}:A", PARAMS, MUON).model.architecture.class_ == "A"
    two.write_text("class A:\n    pass\n")
    with pytest.raises(ParamsError, match=r"two.py: has no class that is a torch.nn.Module"):
        find_candidate(str(two), PARAMS, MUON)
    with pytest.raises(ParamsError, match=r"no file .*/absent.py"):
        find_candidate(str(tmp_path / "absent.py"), PARAMS, MUON)


def test_its_settings_and_those_of_the_training_can_be_changed():
    dense = find_candidate("dense", PARAMS, MUON)
    wanted = ["architecture.d_ff=24", "optimizer.peak_lr=2e-3", "train.max_steps=9"]
    found, train = changed(dense, wanted)
    assert found.model.architecture == replace(dense.model.architecture, d_ff=24) and train == {"max_steps": 9}
    assert found.model.optimizer.peak_lr == 2e-3
    for wrong, why in (
        ("architecture.d_f=24", "did you mean `d_ff`"),
        ("d_ff=24", "KEY starts with one of architecture, optimizer, settings, train and a dot"),
        ("architecture.d_ff", "write KEY=VALUE"),
        ("architecture.d_ff={", "not valid YAML"),
        ("settings.hidden=3", "settings: unknown key"),
    ):
        with pytest.raises(ParamsError, match=why):
            changed(dense, [wrong])
    gpt = find_candidate(str(FOLDER / "gpt.py"), PARAMS, MUON)
    assert changed(gpt, ["settings.d_model=16"])[0].model.architecture.settings == {"d_model": 16}


def test_the_baseline_is_the_first_dense_model_and_not_the_candidate():
    dense = find_baseline(None, PARAMS)
    assert dense.name == "dense" and find_baseline("stacked", PARAMS).name == "stacked"
    with pytest.raises(ParamsError, match="dense is the baseline itself; choose another with --baseline"):
        gate_experiment(dense, dense, PARAMS, **TERMS)
    with pytest.raises(ParamsError, match=r"--baseline dens: no such model.*did you mean `dense`"):
        find_baseline("dens", PARAMS)


# The course of a gate, with made-up scores.


def course(lab: Lab, true: float, noise: float = 0.002, failing: tuple[int, ...] = (), records: dict | None = None) -> Gate:
    """The gate after all that may run, where the candidate is so much worse."""
    records = {} if records is None else records
    while pending := lab.pending(records):
        one = pending[0]
        seed, mine = one.trial.train.seed, one.arm.name != "baseline"
        bits = 2 + 0.02 * random.Random(seed).gauss(0, 1) + abs(one.trial.model.optimizer.peak_lr - 1e-3)
        bits *= 1 + mine * (true + noise * random.Random(-seed).gauss(0, 1))
        whole = {"valid": {"bits_per_byte": bits}, "test": {"bits_per_byte": bits}, "seconds": 2.0, "flops": 10**9}
        failed = mine and seed in failing
        records[one.trial.identity] = {"failed": "diverged"} if failed else whole
    return Gate(lab, records, pace(lab, dict.fromkeys(["baseline 1", "mine 1"], 0.5), 640, 2))


@pytest.fixture(scope="module")
def lab() -> Lab:
    return lab_of(gate_experiment(Named("mine", STACKED), BASE, PARAMS, **TERMS))


def paused(lab: Lab, seeds: int, true: float, **more) -> Gate:
    found = course(replace(lab, pause=seeds), true, **more)
    return Gate(lab, found.records, found.pace)


def test_it_stops_at_each_look_without_a_verdict_and_goes_on_from_there(lab):
    records: dict = {}
    for number, seeds in enumerate((3, 5, 8, 12)):
        found = paused(lab, seeds, 0.004, noise=0.02, records=records)
        assert found.look == number + 1 and found.verdict.seeds == seeds and found.outcome == "no verdict"
        assert found.verdict.level == sequential_level((3, 5, 8, 12))
        purposes = [one.purpose for one in lab.trials(records) if one.trial.identity in records]
        assert purposes.count("judge") == 2 * seeds and purposes.count("tune") == len(records) - 2 * seeds >= 10
        assert found.plain()["more_seeds"] == found.verdict.more_seeds and found.plain()["exit_code"] == 5
        assert found.next_look == (5, 8, 12, None)[number]
        assert ("all 12 declared seeds are used" in found.sentence()) == (number == 3)


def test_each_look_says_what_it_takes_and_can_see(lab):
    fresh = Gate(lab, {}, pace(lab, {"baseline 1": 0.5, "mine 1": 1.0}, 640, 2))
    assert [len(fresh.trainings(i)) for i in range(4)] == [10 + 6, 4, 6, 8]
    step, shared = (2.0 + 12 * s + (640 + 2 * 256) / 64 / 3 * s for s in (0.5, 1.0))
    assert fresh.pace(fresh.trainings(1)) == pytest.approx(2 * (step + shared) / 2)
    rows = fresh.table().splitlines()[2:6]
    seen = [float(row.split()[-1].rstrip("%")) for row in rows]
    assert seen == sorted(seen, reverse=True) and [row.split()[1] for row in rows] == ["3", "5", "8", "12"]
    done = paused(lab, 5, 0.004, noise=0.02)
    assert [len(done.trainings(i)) for i in range(4)] == [0, 0, 6, 8] and done.table().count("done") == 2


def test_a_seed_that_failed_is_left_out_and_too_many_give_no_verdict(lab):
    assert course(lab, -0.04, failing=(2,)).outcome == "better"
    found = paused(lab, 3, 0.0, failing=(1, 2, 3))
    assert found.verdict is None and found.outcome == "no verdict" and found.next_look == 5
    assert "fewer than 3 seeds are complete" in found.sentence() and found.plain()["mean"] is None


def test_the_interval_is_drawn_as_it_narrows(lab):
    found = course(lab, 0.004, noise=0.02)
    judged = [one for one in lab.trials(found.records) if one.purpose == "judge"]
    assert "seeds [" in found.line(judged[-1], 0)
    early = Gate(lab, {k: v for k, v in found.records.items() if k not in {one.trial.identity for one in judged[4:]}}, found.pace)
    assert "[" not in early.line(judged[3], 0)  # two seeds have none
    verdict = Verdict("no verdict", 0.01, -0.02, 0.04, 0.1, 3, 0.01, 0.005)
    assert bar(verdict, 0.04) == "[          (---------|----o--------------)]"
    assert bar(replace(verdict, low=-0.2, high=-0.01, mean=-0.05), 0.04).startswith("[o") and ">" in bar(verdict, 0.03)


def test_the_pace_is_corrected_by_what_trials_took(lab):
    expected = pace(lab, {"baseline 1": 0.5, "mine 1": 1.0}, 640, 2)
    arms = [*lab.arms, *lab.arms]
    found = expected.corrected(arms, 3 * expected(arms))
    assert found(lab.arms) == pytest.approx(3 * expected(lab.arms)) and expected.corrected([], 5.0) == expected


def test_the_report_and_the_text_say_of_what_the_intervals_are(lab, tmp_path):
    found = course(lab, -0.04)
    findings = Findings("try-mine", lab, found.records)
    assert "98.4% intervals" in result_text(findings)
    notes = report(findings, tmp_path).notes
    assert "Looks were declared at 3, 5, 8, 12 seeds; the error rate is over all of them. Intervals: 98.4%." in notes
