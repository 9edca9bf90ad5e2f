"""What was published, beside what is counted; most of it on models small enough to be counted by hand."""

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
from support.lab_records import course, make_lab, recorded

SMALL = ModelConfig(Stacked(64, 4, (Stack(4, 16, 16), Stack(4, 32, 32))), vocab_size=50, context_length=16)


def test_layers_side_by_side_are_one_attention_layer():
    text = str(claims.layers(128))
    assert "128 layers, 2 of them in series" in text
    assert "64 * 4 = 256 heads with keys of 128 and values of 8" in text and "values of 32, a map 512 -> 2048" in text


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


def test_a_stack_more_for_each_further_context():
    text = str(claims.context("seed-2x64"))
    assert "+2K context" in text and "at a context of 8,192: 5 stacks" in text


def test_the_head_is_counted():
    text = str(claims.head("seed-2x64"))
    assert "52% of all parameters" in text and "float32: 1.8 GB" in text and "gradient: 5.41 GB" in text


def test_the_memory_of_a_dense_twin_is_of_the_same_size():
    text = str(claims.memory("seed-2x64"))
    assert "dense, 12 layers, 1,024 wide" in text and "keys and values 303 kB per token" in text and "98.3 kB" in text


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


def test_every_claim_is_printed(monkeypatch, capsys):
    monkeypatch.setattr(claims, "PRESETS", {"seed-2x64": SMALL, "seed-4x8": SMALL})
    monkeypatch.chdir(ROOT)
    cli.claims()
    text = capsys.readouterr().out
    assert sum(line.startswith("seed-") for line in text.splitlines()) == 11
    assert 'seed-2x64: "128 layers"\n  8 layers, 2 of them in series\n  - 2 stacks of 4 and 4 layers' in text
    assert f"{count(SMALL.architecture, 50, 16).total:,}" in text and "\n  yes: it takes" in text
