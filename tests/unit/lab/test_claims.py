"""Published claims compared with counts, mostly on models small enough to count by hand."""

import pytest

from stacklm import cli
from stacklm.config.model import Stack, Stacked
from stacklm.lab import claims
from stacklm.lab.findings import Findings
from stacklm.model.build import PRESETS, ModelConfig
from stacklm.model.count import count
from stacklm.pipeline.lab import claims_here
from stacklm.pipeline.project import Project
from support import ROOT
from support.checkout import write_project
from support.lab_records import course, make_lab, recorded

SMALL = ModelConfig(Stacked(64, 4, (Stack(4, 16, 16), Stack(4, 32, 32))), vocab_size=50, context_length=16)


@pytest.mark.parametrize(
    ("claim", "of", "figures"),
    [
        ("layers", 128, ["128 layers, 2 of them in series", "64 * 4 = 256 heads with keys of 128 and values of 8"]),
        ("layers", 128, ["values of 32, a skip map 512 -> 2048"]),
        ("context", "seed-2x64", ["+2K context", "at a context of 8,192: 5 stacks"]),
        ("head", "seed-2x64", ["52% of all parameters", "float32: 1.8 GB", "gradient: 5.41 GB"]),
        ("memory", "seed-2x64", ["dense, 12 layers, width 1,024", "keys and values of 303 kB per token", "98.3 kB"]),
    ],
)
def test_figures_are_counted(claim, of, figures):
    text = str(getattr(claims, claim)(of))
    assert [one for one in figures if one not in text] == []


def test_the_width_at_which_it_is_a_tenth_is_the_least():
    claim = claims.share("seed-2x64", 128, 10)
    found = claims.counts(PRESETS["seed-2x64"])
    width = claims.width_of(10 * claims.body(found), 128)
    assert claims.dense_body(width - 64, 128) < 10 * claims.body(found) <= claims.dense_body(width, 128)
    assert f"against a width of about {width:,}" in claim.verdict and width == 1024
    assert claims.dense_body(512, 128) == pytest.approx(12 * 128 * 512**2, rel=0.001)  # but for gains
    assert "403 M: 1/2.6" in str(claim) and "3.93 B: 1/25.3" in str(claim)


def test_sizes_are_those_of_the_models():
    assert claims.size("seed-2x64", 400e6).verdict == "436,967,344: +9%"
    assert claims.size("seed-4x8", 78e6).verdict == "514,390,448: 6.6 times as many"


def test_a_claim_about_loss_rests_on_the_verdicts_of_experiments():
    lab = make_lab()
    findings = Findings("one", lab, course(lab, record=recorded)[0])
    claim = claims.measured("form", "is better", {"one": ["worse"], "two": None}, {"one": findings})
    verdict = findings.final.verdicts["worse"]
    assert claim.verdict == f"worse {verdict.mean:+.1%}: worse; not measured yet"
    assert any(f"({verdict.low:+.2%} to {verdict.high:+.2%})" in figure for figure in claim.figures)
    assert "stacklm run-flow lab two" in str(claim) and claim.commands == ["stacklm lab show one", "stacklm lab show two"]


@pytest.mark.numerical
def test_the_page_in_the_documentation_is_what_code_and_records_say():
    """`stacklm claims --write docs/claims.md` brings it up to date."""
    assert (ROOT / "docs/claims.md").read_text(encoding="utf-8") == claims.page(claims_here(Project.find(ROOT)))


def test_every_claim_is_printed_also_where_nothing_was_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(claims, "PRESETS", {"seed-2x64": SMALL, "seed-4x8": SMALL})
    monkeypatch.chdir(write_project(tmp_path).root)
    cli.claims()
    text = capsys.readouterr().out
    assert sum(line.startswith("seed-") for line in text.splitlines()) == 11
    assert 'seed-2x64: "128 layers"\n  8 layers, 2 of them in series\n  - 2 stacks of 4 and 4 layers' in text
    assert f"{count(SMALL.architecture, 50, 16).total:,}" in text and "\n  yes: it takes" in text
