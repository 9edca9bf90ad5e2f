"""The code exported with a model runs by itself: files that import each other, with only what they need of this package."""

from __future__ import annotations

import ast

import pytest

from stacklm.export.source import bundle


@pytest.fixture(scope="module")
def files() -> dict[str, str]:
    return bundle("stacklm.model.cache") | bundle("stacklm.model.dense")


def imported(text: str) -> set[str]:
    """Modules that a file imports, those beside it with a dot."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("." * node.level + (node.module or "").partition(".")[0])
    return found


def test_files_import_each_other_and_libraries_alone(files: dict[str, str]):
    for name, text in files.items():
        assert "stacklm" not in imported(text), name
        assert {one.removeprefix(".") + ".py" for one in imported(text) if one.startswith(".")} <= files.keys(), name


def test_nothing_is_there_that_is_not_needed():
    files = bundle("stacklm.model.dense")
    defined = {node.name for text in files.values() for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ClassDef)}
    assert {"DenseDecoder", "Attention", "RMSNorm"} <= defined
    assert not {"PackedLinear", "Stacked", "Optimizer", "Python"} & defined


def test_what_completes_an_operation_comes_with_it_under_a_name_of_its_own():
    text = bundle("stacklm.model.stacked")["model_kernels_attention.py"]
    assert "blocked_attention.register_autograd(" in text and "@blocked_attention.register_fake" in text
    assert '"stacklm::' not in text and "torch.ops.stacklm" not in text


def test_names_from_elsewhere_keep_their_names_here():
    text = bundle("stacklm.model.stacked")["model_stacked.py"]
    assert "from .config_model import FactoredAttention as Factored\n" in text
    assert "import torch.nn.functional as F\n" in text
