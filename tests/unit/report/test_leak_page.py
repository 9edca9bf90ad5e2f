"""The report on leaks: one file, with a curve, a certificate and the apparent gain in words for each case."""

from __future__ import annotations

import re
from pathlib import Path

from stacklm.audit.audit import Finding
from stacklm.lab.leak import FLOOR, Outcome, Point
from stacklm.report.leak import sentences, summary, write_page

SOUND = Outcome("right", "Nobody is told.", (Point(25, FLOOR, FLOOR, FLOOR), Point(50, FLOOR, FLOOR, FLOOR)), (), 15)
FAULTS = (Finding("pairs", "weights", "no logit changes", False, "upper-triangular mask: positions see later tokens"),)
LEAKY = Outcome("wrong mask", "The next token is shown.", (Point(25, 2.0, 1.0, 4.0), Point(50, 0.5, FLOOR / 10, 4.5)), FAULTS, 15)


def test_the_sentences_say_what_is_pretended_and_what_is_honest():
    assert sentences(LEAKY) == (
        "It appears to know 90% of every token (reported loss 0.28): the next token is shown. An honest evaluation gives 4.50, "
        "worse than guessing."
    )
    assert sentences(SOUND).startswith("It appears to know nothing: ") and "2.77, equal to guessing" in sentences(SOUND)


def test_the_table_has_reported_and_honest_losses_and_the_name_of_the_fault():
    rows = [line.split() for line in summary([SOUND, LEAKY]).splitlines() if line]
    assert ["right", "2.77", "2.77", "2.77", "all", "15", "checks", "passed"] in rows
    assert ["wrong", "mask", "0.50", "0.28", "4.50", "upper-triangular", "mask;", "1", "of", "15", "checks", "failed"] in rows


def test_the_page_is_one_file_with_a_curve_for_each_case(tmp_path: Path):
    page = write_page([SOUND, LEAKY], tmp_path / "leak").read_text()
    sources = re.findall(r'(?:src|href)="([^"]{0,30})', page)
    assert len(sources) == 2 and all(source.startswith("data:image/svg+xml") for source in sources)
    assert "positions see later tokens" in page and "1 of 15 checks failed" in page
    markdown = (tmp_path / "leak" / "leak.md").read_text()
    for drawing in re.findall(r"\]\((.*?\.svg)\)", markdown):
        assert (tmp_path / "leak" / drawing).exists()
    again = write_page([SOUND, LEAKY], tmp_path / "again").read_text()
    assert page == again
