"""The identity of code: which changes count, and which do not."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from stacklm.code import MODULE, ROOT, file_units, import_closure, units

SOURCE = '''\
"""A module."""
from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import nn

__version__ = "1"
RATE = 0.5
"""Of what."""
seen: list[int] = []


@dataclass
class Point:
    """A point."""

    x: int = 0

    def move(self, by: int) -> Point:
        total: int = self.x + by
        return Point(total)


@torch.library.custom_op("a::b", mutates_args=())
def registered(x: int) -> int:
    return x


def step(values: Iterable[int], scale: float = 1.0) -> float:
    """Take a step."""
    if not seen:
        raise ValueError("nothing seen")  # at all
    return sum(values) * scale + RATE


if RATE > 1:
    RATE = 1
'''


def identity(folder: Path, source: str) -> dict[str, str]:
    package = folder / "stacklm"
    package.mkdir(exist_ok=True)
    (package / "__init__.py").write_text("")
    (package / "module.py").write_text(source)
    found = units(["stacklm.module"], folder)
    return {name.removeprefix("stacklm/module.py "): digest for name, digest in found.items()}


def changed(folder: Path, old: str, new: str) -> set[str]:
    """The names of the units that another text in the module's source changes."""
    assert SOURCE.count(old) >= 1
    before, after = identity(folder, SOURCE), identity(folder, SOURCE.replace(old, new))
    return {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"""A module."""\n', ""),
        ('"""Take a step."""', '"""Take\n    two."""'),
        ('"""Of what."""\n', ""),
        ("  # at all", ""),
        ("values: Iterable[int], scale: float", "values, scale: int"),
        ("by: int) -> Point:", "by):"),
        ("total: int =", "total: float ="),
        ("seen: list[int] = []", "seen: list[float] = []"),
        ("from collections.abc import Iterable\n", "from typing import Any\n"),
        ("    from torch import nn", "    from stacklm import absent"),
        ('__version__ = "1"', '__version__ = "2"'),
        ("sum(values) * scale + RATE", "(sum(values) * scale) + (\n        RATE)"),
        ("\n\n\n", "\n\n"),
    ],
)
def test_what_cannot_change_a_result_does_not_count(tmp_path: Path, old: str, new: str) -> None:
    assert changed(tmp_path, old, new) == set()


@pytest.mark.parametrize(
    ("old", "new", "names"),
    [
        ("* scale + RATE", "* scale - RATE", {"step"}),
        ("scale: float = 1.0", "scale: float = 1", {"step"}),
        ('"nothing seen"', '"nothing"', {"step"}),
        ("    x: int = 0", "    x: float = 0", {"Point"}),
        ("    x: int = 0", "    x: int = 1", {"Point"}),
        ("@dataclass\n", "@dataclass(frozen=True)\n", {"Point"}),
        ("self.x + by", "self.x - by", {"Point.move"}),
        ("registered(x: int)", "registered(x: float)", {"registered"}),
        ("RATE = 0.5", "RATE = 0.25", {"RATE"}),
        ("seen: list[int] = []", "seen: list[int] = [1]", {"seen"}),
        ("RATE > 1", "RATE > 2", {MODULE}),
        ("import torch\n", "import torch.nn\n", {MODULE}),
        ("from dataclasses import dataclass", "from torch import dataclass", {MODULE}),
        ("def step", "def steps", {"step", "steps", MODULE}),
    ],
)
def test_what_can_change_a_result_is_named(tmp_path: Path, old: str, new: str, names: set[str]) -> None:
    assert changed(tmp_path, old, new) == names


def test_docstrings_count_where_a_module_beside_reads_them(tmp_path: Path) -> None:
    reader = SOURCE + "\n\ndef claim(check) -> str:\n    return check.__doc__\n"
    before = identity(tmp_path, reader)
    after = identity(tmp_path, reader.replace('"""Take a step."""', '"""Take two."""'))
    assert {name for name in before if before[name] != after[name]} == {"step"}


def test_the_order_of_definitions_counts(tmp_path: Path) -> None:
    source = "A = 1\nB = A\nA = 2\n"
    assert identity(tmp_path, source) != identity(tmp_path, "A = 1\nA = 2\nB = A\n")


def test_a_closure_holds_what_is_imported_and_the_packages_around_it() -> None:
    found = import_closure("stacklm.data.batches")
    assert {"stacklm/__init__.py", "stacklm/data/__init__.py", "stacklm/data/batches.py", "stacklm/data/shards.py"} <= found
    assert "stacklm/data/tokenizer.py" not in found
    assert import_closure("torch") == frozenset()


def test_any_file_of_the_closure_counts_and_no_other(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "stacklm", tmp_path / "stacklm", ignore=shutil.ignore_patterns("__pycache__"))
    modules = ["stacklm.data.batches"]
    before = units(modules, tmp_path)
    assert before == units(modules)
    for file in sorted(import_closure(*modules)):
        path, text = tmp_path / file, (tmp_path / file).read_bytes()
        path.write_bytes(text + b"\nx = 1\n")
        assert units(modules, tmp_path) != before
        path.write_bytes(text)
    (tmp_path / "stacklm/data/tokenizer.py").write_text("")
    assert units(modules, tmp_path) == before


def test_templates_count_where_their_module_is_imported(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "stacklm", tmp_path / "stacklm", ignore=shutil.ignore_patterns("__pycache__"))
    before = units(["stacklm.report.compare"], tmp_path)
    page = tmp_path / "stacklm/report/templates/page.html"
    page.write_text(page.read_text() + "more")
    after = units(["stacklm.report.compare"], tmp_path)
    assert [key for key in after if before.get(key) != after[key]] == ["stacklm/report/templates/page.html <text>"]
    assert not [key for key in units(["stacklm.train.pretrain"]) if "templates" in key]


def test_hashes_do_not_depend_on_the_version_of_python(tmp_path: Path) -> None:
    """Such as by what `ast.dump` prints: DVC would find every stage stale after an update of Python."""
    assert identity(tmp_path, SOURCE)["step"] == "2a1c835169fc993b", sys.version


def test_a_file_counts_with_what_it_imports_from_its_folder_and_the_versions_of_packages(tmp_path):
    files = {
        "mine.py": "import json\nimport torch\nimport tqdm\nimport parts\nfrom pkg.deep.er import f\n",
        "parts.py": "import mine\nSIZE = 1\n",
        "pkg/__init__.py": "",
        "pkg/deep/__init__.py": "from .. import above\n",
        "pkg/deep/er.py": "def f():\n    from .beside import g\n    return g()\n",
        "pkg/deep/beside.py": "def g():\n    return 1\n",
        "pkg/above.py": "HIGH = 2\n",
        "pkg/unused.py": "LOW = 0\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    found = file_units(tmp_path / "mine.py")
    assert {unit.partition(" ")[0] for unit in found} == {*files, "version"} - {"pkg/unused.py"}
    assert [unit for unit in found if unit.startswith("version")] == ["version of tqdm"]
    (tmp_path / "pkg/deep/beside.py").write_text("def g():  # one\n    return 2\n")
    now = file_units(tmp_path / "mine.py")
    assert [unit for unit in now if now[unit] != found[unit]] == ["pkg/deep/beside.py g"]
