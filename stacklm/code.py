"""The package's own source code as data: what importing a module can execute, and one hash for each function and class of it.

Code is identified by its syntax trees, and what cannot change a result does not count: comments, docstrings, layout,
annotations, imports from `typing` and `collections.abc`, what is below `if TYPE_CHECKING`, and `__version__`. Annotations
in class bodies do count, since dataclasses are made from them, and so do those of decorated functions, since a decorator
may read them (`torch.library.custom_op` does). Docstrings count in a folder with a module that reads them: the audit
writes the claims of its checks into certificates. The order of definitions counts too.
"""

from __future__ import annotations

import ast
import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

PACKAGE = "stacklm"
ROOT = Path(__file__).resolve().parent.parent
MODULE = "<module>"
"""The unit of what a module executes outside of its functions, classes and constants."""
TEXT = "<text>"
"""The unit of a template."""


def import_closure(module: str, root: Path = ROOT) -> frozenset[str]:
    """The package's source files that importing `module` can execute, found from the import statements alone.

    As posix paths relative to `root`, the folder that holds the package.
    """
    found: set[str] = set()
    queue = [module]
    while queue:
        name = queue.pop()
        path = _source(name, root)
        if path is None or path in found:
            continue
        found.add(path)
        queue.append(name.rpartition(".")[0])  # importing a module runs its parents' __init__
        queue.extend(_analyse((root / path).read_text(encoding="utf-8"), False)[0])
    return frozenset(found)


def source_root(project: Path) -> Path:
    """The folder that holds the package's source: the project where it has its own, else where this package is installed."""
    return project if (project / PACKAGE).is_dir() else ROOT


def units(modules: Iterable[str], root: Path = ROOT) -> dict[str, str]:
    """A hash of each function, class and constant that importing the modules can define, by file and qualified name.

    Such as `stacklm/train/trainer.py train_step`; and of each file in a folder `templates` beside such a module. Sorted.
    """
    files = sorted(set().union(*(import_closure(module, root) for module in modules)))
    sources = {file: (root / file).read_text(encoding="utf-8") for file in files}
    documented = {Path(file).parent for file, source in sources.items() if _analyse(source, False)[2]}
    read = {file: _analyse(source, Path(file).parent in documented)[1] for file, source in sources.items()}
    found = {f"{file} {name}": digest for file, named in read.items() for name, digest in named.items()}
    for path in {path for file in files for path in (root / file).parent.glob("templates/*")}:
        found[f"{path.relative_to(root).as_posix()} {TEXT}"] = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    return dict(sorted(found.items()))


def digest(plain: Any) -> str:
    """The SHA-256 of plain values, such as units and their hashes; the order of keys does not count."""
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _source(module: str, root: Path) -> str | None:
    """The file of a module of this package, as a posix path from the root; None for anything else."""
    if module.partition(".")[0] != PACKAGE:
        return None
    base = (root / PACKAGE).joinpath(*module.split(".")[1:])
    for path in (base.with_suffix(".py"), base / "__init__.py"):
        if path.is_file() and path != (root / PACKAGE).with_suffix(".py"):
            return path.relative_to(root).as_posix()
    return None


@cache
def _analyse(source: str, docstrings: bool) -> tuple[frozenset[str], dict[str, str], bool]:
    """What a source file may import, the hash of each of its units, with or without docstrings, and whether it reads docstrings."""
    tree = _WithoutNotes(docstrings).visit(ast.parse(source))
    imported: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            imported |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    reads = any(isinstance(node, ast.Attribute) and node.attr in ("__doc__", "getdoc") for node in ast.walk(tree))
    shapes: defaultdict[str, list[Any]] = defaultdict(list)  # a property and its setter have one name
    _collect(tree, MODULE, "", shapes)
    hashes = {name: hashlib.sha256(repr(shape).encode()).hexdigest()[:16] for name, shape in shapes.items()}
    return frozenset(imported), hashes, reads


class _WithoutNotes(ast.NodeTransformer):
    """Takes out docstrings, unless they count, and what is there for type checkers alone."""

    def __init__(self, docstrings: bool) -> None:
        self._docstrings = docstrings

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        return None if isinstance(node.value, ast.Constant) and not self._docstrings else self.generic_visit(node)

    def visit_If(self, node: ast.If) -> Any:
        self.generic_visit(node)
        return node.orelse if ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING") else node

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.AST | None:
        for_types = node.module in ("typing", "collections.abc") and not any(alias.asname for alias in node.names)
        return None if for_types else node


def _collect(node: Any, name: str, prefix: str, shapes: defaultdict[str, list[Any]]) -> None:
    """Add the shapes of a module or class, and of what is defined directly in it, by qualified name."""
    rest: list[Any] = []  # names in their order, and whatever else is executed
    for statement in node.body:
        match statement:
            case ast.Assign(targets=[ast.Name(id="__version__")]):
                continue
            case ast.ClassDef(name=own):
                _collect(statement, prefix + own, f"{prefix}{own}.", shapes)
            case ast.FunctionDef(name=own) | ast.AsyncFunctionDef(name=own):
                shapes[prefix + own].append(_shape(statement, False))
            case ast.Assign(targets=[ast.Name(id=own)]) | ast.AnnAssign(target=ast.Name(id=own)) if not prefix:
                shapes[own].append(_shape(statement, False))
            case _:
                own = _shape(statement, bool(prefix))
        rest.append(own)
    node.body = []
    shapes[name].append([_shape(node, True), rest])


def _shape(node: Any, annotations: bool) -> Any:
    """A syntax tree as nested lists, equal in every version of Python; `annotations` says whether those count here."""
    if isinstance(node, list):
        return [_shape(item, annotations) for item in node]
    if not isinstance(node, ast.AST):
        return repr(node)
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        annotations = bool(node.decorator_list)
    elif isinstance(node, (ast.ClassDef, ast.Lambda)):
        annotations = isinstance(node, ast.ClassDef)
    fields = [(name, value) for name, value in ast.iter_fields(node) if value is not None and value != []]
    kept = [(name, value) for name, value in fields if annotations or name not in ("annotation", "returns")]
    return [type(node).__name__, *([name, _shape(value, annotations)] for name, value in kept if name not in ("ctx", "kind"))]
