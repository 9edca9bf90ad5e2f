import pytest

from stacklm.units import count, duration, percent, plural, quantity, signed


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (7, "7"),
        (0.25, "0.25"),
        (999, "999"),
        (3000, "3 k"),
        (999_900, "1 M"),
        (1_234_567, "1.23 M"),
        (4.5e9, "4.5 B"),
        (2e15, "2000 T"),
    ],
)
def test_count_has_three_digits_and_a_prefix(value, text):
    assert count(value) == text


def test_quantity_uses_the_prefixes_of_the_si():
    assert quantity(45_600_000, "FLOP/token") == "45.6 MFLOP/token"
    assert quantity(4.5e9, "B") == "4.5 GB"
    assert quantity(812, "B") == "812 B"
    assert quantity(2e11, "") == "200 G"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.04 s"),
        (4.21, "4.2 s"),
        (9.99, "10 s"),
        (59.6, "1 min"),
        (92.4, "1 min 32 s"),
        (3599.7, "1 h"),
        (11_100, "3 h 5 min"),
        (187_200, "2 d 4 h"),
    ],
)
def test_duration_shows_its_two_largest_units(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(("number", "text"), [(0, "0 seeds"), (1, "1 seed"), (2, "2 seeds"), (1000, "1,000 seeds")])
def test_one_thing_has_no_plural(number, text):
    assert plural(number, "seed") == text


def test_differences_carry_a_true_minus_and_zero_no_sign():
    assert signed(-0.0123, 3) == "\N{MINUS SIGN}0.012"
    assert signed(0.26, 1) == "+0.3"
    assert signed(-0.0001, 2) == "0.00"


def test_percent_tells_equal_from_nearly_equal():
    assert percent(0) == "0%"
    assert percent(-0.0004) == "under 0.1%"
    assert percent(-0.549) == "\N{MINUS SIGN}54.9%"
    assert percent(2.5) == "+250%"
