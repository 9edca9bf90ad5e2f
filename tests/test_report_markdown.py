import pytest
from report_files import MANIFEST, MODELS, TRAIN, Folders

from stacklm.report.comparison import build_comparison
from stacklm.report.markdown import markdown


@pytest.fixture
def folders(tmp_path):
    return Folders(tmp_path, {"stacked": 3.31, "dense": 3.22})


def text_of(runs, curves=("tokens",)):
    return markdown(build_comparison(runs, TRAIN, MANIFEST, data_sha256="ab" * 32), runs, curves)


def test_tables_have_as_many_cells_in_every_row(folders):
    tables = [block for block in text_of(folders.runs()).split("\n\n") if block.startswith("| |")]
    assert len(tables) == 5
    for table in tables:
        assert len({line.count("|") for line in table.splitlines()}) == 1


def test_nothing_in_a_sample_ends_its_block(folders):
    runs = folders.runs()
    runs[0].evaluation["sample"]["text"] = "x\n```\n# not a heading\n\n| nor | a table |"
    block = text_of(runs).split("### stacked\n\n")[1].split("\n\n### dense")[0]
    assert block.splitlines()[0] == "    def x"
    assert all(line.startswith("    ") for line in block.splitlines())


def test_only_curves_that_were_drawn_are_shown(folders):
    assert "loss-time-light.png" not in text_of(folders.runs())
    assert "(loss-tokens-light.png)" in text_of(folders.runs())


def test_one_model_alone_has_no_differences(folders):
    text = text_of(folders.runs({"dense": MODELS["dense"]}))
    assert text.startswith("# dense, on its own\n")
    assert "## Differences" not in text
