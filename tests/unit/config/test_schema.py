"""The strict reader: what it accepts, and errors that name key, value, the allowed values and the nearest key."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import pytest

from stacklm.config.schema import Count, ParamsError, Share, plain, read


@dataclass(frozen=True)
class Apple:
    size: Count
    kind: Literal["apple"] = "apple"


@dataclass(frozen=True)
class Pear:
    sweet: bool
    kind: Literal["pear"] = "pear"


@dataclass(frozen=True)
class Basket:
    fruit: Apple | Pear
    share: Share = 0.5
    names: tuple[str, ...] = ()
    limit: Count | None = None
    more: dict[str, Apple] = field(default_factory=dict)


@dataclass(frozen=True)
class Bowl:
    fruit: Apple | Pear = Apple(1)


def test_reads_nested_values_and_fills_defaults():
    basket = read(Basket, {"fruit": {"kind": "pear", "sweet": True}, "names": ["a"], "more": {"x": {"size": 2}}})
    assert basket == Basket(Pear(sweet=True), 0.5, ("a",), None, {"x": Apple(2)})


def test_a_section_without_its_kind_is_of_the_kind_that_is_the_default():
    assert read(Bowl, {}) == Bowl(Apple(1))
    assert read(Bowl, {"fruit": {"size": 3}}) == Bowl(Apple(3))
    assert read(Bowl, {"fruit": {"kind": "pear", "sweet": True}}) == Bowl(Pear(True))
    with pytest.raises(ParamsError, match=r"fruit\.sweet: unknown key of kind apple, .* size, kind; it is one of kind pear"):
        read(Bowl, {"fruit": {"sweet": True}})
    with pytest.raises(ParamsError, match=r"fruit\.kind: None is not allowed; choose one of apple, pear"):
        read(Basket, {"fruit": {"size": 3}})  # where there is no default


def test_plain_is_the_inverse():
    tree = {"fruit": {"size": 3, "kind": "apple"}, "share": 1.0, "names": ["a", "b"], "limit": 4, "more": {}}
    assert plain(read(Basket, tree)) == tree


def test_a_whole_number_may_stand_for_a_float_and_nothing_else_is_converted():
    assert read(float, 1) == 1.0
    for kind, value in ((int, 1.0), (int, True), (float, True), (float, "1"), (str, 1), (bool, 1), (int, None)):
        with pytest.raises(ParamsError, match="expected"):
            read(kind, value, "key")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"shares": 1}, ["shares", "unknown key", "did you mean `share`?"]),
        ({"share": 1.5}, ["share: 1.5", ">= 0 and <= 1"]),
        ({"share": "much"}, ["share", "a number", "'much'"]),
        ({"names": "a"}, ["names", "a list", "'a'"]),
        ({"more": {"x": {"size": 0}}}, ["more.x.size: 0", ">= 1"]),
        ({"fruit": {"kind": "aple", "size": 1}}, ["fruit.kind: 'aple'", "apple, pear", "did you mean `apple`?"]),
        ({"fruit": {"kind": "apple"}}, ["fruit.size", "missing"]),
        ({"fruit": {"kind": "apple", "size": 1, "sweet": True}}, ["fruit.sweet", "unknown key", "size, kind"]),
        ({"fruit": 3}, ["fruit", "mapping", "apple, pear"]),
    ],
)
def test_errors_say_what_is_wrong_and_what_would_be_right(change, words):
    with pytest.raises(ParamsError) as caught:
        read(Basket, {"fruit": {"kind": "apple", "size": 1}, **change})
    for word in words:
        assert word in str(caught.value)
