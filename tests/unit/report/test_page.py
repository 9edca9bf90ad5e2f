"""The report as HTML and as Markdown: the same content, well formed, self-contained, and without executable user text."""

from html.parser import HTMLParser

import pytest
from markdown_it import MarkdownIt

from stacklm.report.comparison import build_comparison
from stacklm.report.page import comparison_report, title, write_report
from support.report_files import MANIFEST, MODELS, TRAIN

HOSTILE = "<script>alert(1)</script> & </pre>\n```\n# not a heading\n\n| nor | a table |"


class Outline(HTMLParser):
    """Checks that tags are closed in order and gathers text, headings and addresses."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open, self.text, self.headings, self.links = [], [], [], []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.links += [value for name, value in attrs if name in ("src", "srcset", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        if self.open and self.open[-1] in ("h1", "h2"):
            self.headings.append(data)


def written(results, folder):
    """The page and the Markdown of a comparison of these results."""
    comparison = build_comparison(results, TRAIN, MANIFEST, data_sha256="ab" * 32)
    write_report(comparison_report(comparison, results, folder), folder)
    return Outline((folder / "index.html").read_text(encoding="utf-8")), (folder / "report.md").read_text(encoding="utf-8")


@pytest.fixture
def both(results, tmp_path):
    results[0].metrics[-1]["health/activation/stack0"] = 0.5
    results[0].evaluation["sample"]["text"] = HOSTILE
    return written(results, tmp_path / "report")


def test_the_page_needs_no_other_file(both):
    *pictures, speed = sorted(both[0].links, key=lambda link: link.startswith(".."))
    assert len(pictures) == 2 + 1  # the losses against two axes, and what is known of health
    assert all(link.startswith("data:image/svg+xml;base64,") for link in pictures)
    assert speed == "../speed/index.html"


def test_both_have_the_same_headings_the_finding_the_caveats_and_what_a_model_writes(both, tmp_path):
    page, markdown = both
    tokens = MarkdownIt("commonmark").enable("table").parse(markdown)
    headings = [tokens[i + 1].content for i, token in enumerate(tokens) if token.type == "heading_open" and token.tag < "h3"]
    assert headings == page.headings
    for text in ("".join(page.text), markdown):
        assert "One seed: indicative only, no verdict." in text
    assert HOSTILE in "".join(page.text)
    blocks = [token.content for token in tokens if token.type == "code_block"]
    assert blocks[0] == f"def {HOSTILE}\n" and len(blocks) == 2
    pictures = {child.attrs["src"] for token in tokens for child in token.children or () if child.type == "image"}
    assert pictures == {path.name for path in (tmp_path / "report").glob("*.svg")}


def test_tables_have_as_many_cells_in_every_row(both):
    tables = [block for block in both[1].split("\n\n") if block.startswith("| |")]
    assert len(tables) == 5
    for table in tables:
        assert len({line.count("|") for line in table.splitlines()}) == 1


def test_one_model_alone_has_no_differences(folders, tmp_path):
    _, text = written(folders.results({"dense": MODELS["dense"]}), tmp_path / "report")
    assert text.startswith("# Report on dense\n")
    assert "## Differences" not in text


def test_titles_name_the_models():
    assert title({"models": {"stacked": {}, "wide": {}, "dense": {}}}) == "Comparison of stacked, wide and dense"
