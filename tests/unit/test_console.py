"""Tables for terminals."""

from stacklm.console import table


def test_a_table_is_aligned_and_takes_its_cells_as_they_are():
    rows = [("[bold]a", "1", "12.5"), ("é" * 300, "1,000", "")]
    header, rule, *lines = table(("model", "tokens", "loss"), rows).splitlines()
    assert header.split() == ["model", "tokens", "loss"] and set(rule) == {"-"}
    assert lines[0].split() == ["[bold]a", "1", "12.5"] and lines[1].split() == ["é" * 300, "1,000"]
    ends = [header.index(" tokens") + 7, lines[0].rindex(" 1 ") + 2, lines[1].index("1,000") + 5]
    assert len(set(ends)) == 1 and len(header) == len(rule) == len(lines[0])


def test_columns_may_be_aligned_left_and_a_header_of_nothing_is_left_out():
    assert table(("", ""), [("a", "one"), ("bb", "x")], left=2) == "a   one\nbb  x"
