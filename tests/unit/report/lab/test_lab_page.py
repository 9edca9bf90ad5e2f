"""The report of an experiment: verdict first, the same bytes for the same records, and readable before it is complete."""

from __future__ import annotations

from pathlib import Path

import pytest

from stacklm.lab.findings import Findings
from stacklm.lab.text import result_text
from stacklm.report.lab import tables
from stacklm.report.lab.page import report, write
from support.lab_records import TRUTH, course, make_lab, recorded, shaped_findings, timed


@pytest.fixture(scope="module")
def findings() -> Findings:
    lab = make_lab()
    return Findings("one", lab, course(lab, record=recorded)[0])


@pytest.fixture(scope="module")
def written(findings: Findings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one") / "report"
    write(findings, folder)
    return folder


def test_the_question_and_the_verdicts_come_first(findings, written):
    page, text = (written / "index.html").read_text(), (written / "report.md").read_text()
    assert text.startswith(f"# {findings.lab.experiment.question}\n\n**better: ")
    for name, verdict in findings.results[2.0].verdicts.items():
        for shown in (page, text):
            assert shown.index(f"{name}: {abs(verdict.mean):.2%}") < shown.index("Refuted by: no difference.")
    assert "stacklm run-flow lab one" in text and "d" * 64 in text and "kernels AVX2" in text


def test_the_page_needs_no_other_file_and_the_markdown_those_beside_it(written):
    page, drawings = (written / "index.html").read_text(), {path.name for path in written.glob("*.svg")}
    assert page.count("data:image/svg+xml;base64,") == len(drawings) and 'src="http' not in page
    budgets = {f"budget-{axis}.svg" for axis in ("parameters", "training_flops", "seconds")}  # tokens are equal for all
    assert drawings == {"intervals.svg", *budgets, "rates-1.svg", "rates-2.svg"}
    assert all(f"({name})" in (written / "report.md").read_text() for name in drawings)


def test_equal_records_give_equal_bytes(findings, written, tmp_path):
    other = Findings("one", findings.lab, dict(reversed(findings.records.items())))
    write(other, tmp_path / "report")
    assert {path.name: path.read_bytes() for path in (tmp_path / "report").iterdir()} == {
        path.name: path.read_bytes() for path in written.iterdir()
    }


def test_the_decoding_of_every_arm_is_shown_with_its_spread_and_machine_where_it_was_measured(findings, written, tmp_path):
    assert "Decoding" not in (written / "report.md").read_text()
    lab = findings.lab
    measured = Findings("one", lab, findings.records, timed(lab.arms, [0.001 * (1 + i) for i in range(len(lab.arms))]))
    write(measured, tmp_path)
    text = (tmp_path / "index.html").read_text() + (tmp_path / f"{tmp_path.name}.md").read_text()
    assert "2026-01-02" in text and "kernels AVX2" in text
    for i in range(len(lab.arms)):
        assert text.count(f"{1 + i:.2f} [{0.9 * (1 + i):.2f}, {1.2 * (1 + i):.2f}] ms") == 2


def test_a_report_can_be_written_at_any_time(findings, tmp_path):
    records = [*findings.records]
    for number in (0, 7, len(records) // 2):
        part = Findings("one", findings.lab, {identity: findings.records[identity] for identity in records[:number]})
        found = report(part, tmp_path)
        assert any("still to run" in note for note in found.notes)
        assert found.finding.startswith("Not judged yet") == (not part.results)


def test_a_record_without_documents_has_no_interval_over_them(findings):
    bare = {
        identity: {key: value for key, value in record.items() if key != "groups"} for identity, record in findings.records.items()
    }
    with_groups, without = tables.verdicts(findings), tables.verdicts(Findings("one", findings.lab, bare))
    assert with_groups.groups["size 1, 8 seeds"][1][:4] == without.groups["size 1, 8 seeds"][1][:4]
    assert without.groups["size 1, 8 seeds"][1][4] == "not recorded"


def test_the_interval_over_documents_holds_the_truth(findings):
    for name, size in ((name, size) for name in findings.candidates for size in findings.results):
        low, high = findings.over_documents(name, size)
        assert low < TRUTH[name] / 2 - 1 < high


def test_five_sizes_have_a_scaling_fit_and_fewer_have_none(findings):
    assert findings.scaling is None
    lab = make_lab("[0.5, 1, 2, 3, 4]")
    found = Findings("one", lab, course(lab, record=recorded)[0])
    gain = found.scaling.beyond["better"]
    assert gain.low < TRUTH["better"] / 2 - 1 < gain.high and found.scaling.size == 4 * found.arm("baseline", 4).cost.parameters
    (rows,) = tables.scaling(found.scaling).groups.values()
    assert [row[0] for row in rows] == [*TRUTH]


def test_stacks_of_several_shapes_have_a_fit_of_depth_and_fewer_have_none(findings, tmp_path):
    assert findings.depth_fit is None and "parallel layers" not in result_text(findings)
    shapes = [(1, 2), (1, 4), (2, 1), (2, 4), (3, 2)]
    losses = {f"stacked-{S}x{N}": 1.8 + 0.3 / S + 0.1 / (S * N) for S, N in shapes}
    found = shaped_findings(shapes, losses)
    fit = found.depth_fit
    assert {*fit.shapes} == {*shapes}  # the dense arms are not among them
    assert [one.value / 1.1 for one in (fit.floor, fit.serial, fit.parallel)] == pytest.approx([1.8, 0.3, 0.1], rel=0.05)
    write(found, tmp_path / "report")
    text = (tmp_path / "report" / "report.md").read_text()
    assert "(depth.svg)" in text and f"| 3 x 2 | {fit.losses[4]:.4f} |" in text
    assert f"{fit.serial.value:.4f} ({fit.serial.low:+.4f} to {fit.serial.high:+.4f})" in result_text(found)
