"""An inner ring never imports an outer one, and training needs few packages."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from support import ROOT

RINGS = [
    "base",
    "config",
    "data",
    "model",
    "train",
    "audit",
    "evaluate",
    "serve",
    "plan",
    "lab",
    "report",
    "export",
    "pipeline",
    "flows",
    "cli",
]
"""From the innermost. `base` are the modules at the top of the package that know nothing of it."""
HEAVY = {
    "prefect",
    "mlflow",
    "dvc",
    "datasets",
    "tokenizers",
    "tiktoken",
    "pyarrow",
    "matplotlib",
    "typer",
    "filelock",
    "rich",
    "transformers",
}


def ring_of(module: str) -> str:
    package, _, rest = module.partition(".")
    first = rest.partition(".")[0]
    if package == "flows":
        return "flows"
    return first if first in RINGS else "cli" if first.startswith("cli") or first == "__main__" else "base"


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in found if name.partition(".")[0] in ("stacklm", "flows") and name != "stacklm"}


def test_no_ring_imports_an_outer_one_and_the_drawing_shows_them_all():
    outward = []
    for path in sorted([*(ROOT / "stacklm").rglob("*.py"), *(ROOT / "flows").glob("*.py")]):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        ring = RINGS.index(ring_of(module))
        outward += [f"{module} imports {name}" for name in sorted(imports(path)) if RINGS.index(ring_of(name)) > ring]
    assert outward == []
    (drawing,) = re.findall(r"stacklm/(config ─► .*)", (ROOT / "docs/architecture.md").read_text(encoding="utf-8"))
    assert drawing.split(" ─► ") == RINGS[1:-1]
    folders = {path.parent.name for path in (ROOT / "stacklm").glob("*/__init__.py")}
    assert folders | {"base", "flows", "cli"} == set(RINGS)


@pytest.mark.parametrize(
    ("statement", "unwanted"),
    [
        ("import stacklm.train.pretrain", HEAVY),  # torch, numpy, safetensors, tqdm and what reads the settings are enough
        ("import stacklm.train.__main__", HEAVY),
        ("import flows.run, flows.pretrain", {"torch", "scipy", "statsmodels"}),  # they would cost every flow seconds
        ("from stacklm import cli", {"torch", "prefect", "mlflow", "dvc", "ruamel"}),  # help is quick
    ],
)
def test_nothing_heavy_is_imported_where_it_is_not_needed(statement: str, unwanted: set[str]):
    code = f"import sys; {statement}; print(*sorted({unwanted} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
