from html.parser import HTMLParser

import pytest
from report_files import MANIFEST, TRAIN, Folders

from stacklm.report.comparison import build_comparison
from stacklm.report.health import draw_health
from stacklm.report.page import page
from stacklm.report.plots import draw_curves

VOID = {"meta", "source", "img"}


class Outline(HTMLParser):
    """Checks that tags are closed in order and gathers text and attributes."""

    def __init__(self):
        super().__init__()
        self.open, self.text, self.links = [], [], []

    def handle_starttag(self, tag, attrs):
        self.links += [value for name, value in attrs if name in ("src", "srcset", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture
def outline(tmp_path):
    runs = Folders(tmp_path, {"stacked": 3.31, "dense": 3.22}).runs()
    comparison = build_comparison(runs, TRAIN, MANIFEST, data_sha256="ab" * 32)
    runs[0].metrics[-1]["health/activation/stack0"] = 0.5
    runs[0].evaluation["sample"]["text"] = "<script>alert(1)</script> & </pre>"
    outline = Outline()
    outline.feed(page(comparison, runs, draw_curves(runs, tmp_path), draw_health(runs, tmp_path), tmp_path))
    return outline


def test_the_page_is_well_formed_and_needs_no_other_file(outline):
    assert outline.open == []
    assert len(outline.links) == 2 * (3 + 1)  # for two themes: the losses against three axes, and what is known of health
    assert all(link.startswith("data:image/png;base64,") for link in outline.links)


def test_what_a_model_writes_is_shown_and_never_run(outline):
    assert "<script>alert(1)</script> & </pre>" in "".join(outline.text)


def test_the_finding_and_the_caveats_are_on_the_page(outline):
    text = " ".join(outline.text)
    assert "One seed: a direction, not a result." in text
    assert "no interval can be given" in text
    assert "stacked is not matched to dense in parameters" in text
