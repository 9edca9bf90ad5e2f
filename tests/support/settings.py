"""Settings as nested mappings and lists, and the error messages for invalid ones."""

from __future__ import annotations

import copy

import pytest

from stacklm.config.params import parse
from stacklm.config.schema import ParamsError


def changed(tree: dict, key: str, value: object) -> dict:
    """A copy with another value at a key, such as `models.stacked.architecture.stacks.0.layers`."""
    tree = copy.deepcopy(tree)
    *path, last = (int(name) if name.isdigit() else name for name in key.split("."))
    place = tree
    for name in path:
        place = place[name]
    place[last] = value
    return tree


def refusal(tree: object) -> str:
    """The error message for invalid settings."""
    with pytest.raises(ParamsError) as caught:
        parse(tree)
    return str(caught.value)
