"""Code dependencies: the source files that importing a module can execute, and a hash of each function and class in them.

Works for this package, and for a user's file with the modules that it imports from its folder.

Code is identified by its syntax tree. Parts that cannot change a result are ignored: comments, docstrings, formatting,
annotations, imports from `typing` and `collections.abc`, code under `if TYPE_CHECKING`, and `__version__`. Annotations in class
bodies do count, since dataclasses are made from them, and so do those of decorated functions, since a decorator may read them
(`torch.library.custom_op` does). Docstrings count in a folder with a module that reads them: the audit writes the claims of its
checks into certificates. The order of definitions counts too.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

PACKAGE = "stacklm"
ROOT = Path(__file__).resolve().parent.parent
MODULE = "<module>"
"""Name of the unit with a module's code outside its functions, classes and constants."""
TEXT = "<text>"
"""Name of the unit with a template's contents."""


def import_closure(module: str, root: Path = ROOT) -> frozenset[str]:
    """The package's source files that importing `module` can execute, found from the import statements alone.

    As POSIX paths relative to `root`, the folder that contains the package.
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
    """The folder that contains the package's source: the project if it has its own, else where this package is installed."""
    return project if (project / PACKAGE).is_dir() else ROOT


def units(modules: Iterable[str], root: Path = ROOT) -> dict[str, str]:
    """A hash of each function, class and constant that importing the modules can define, by file and qualified name.

    Sorted, with keys such as `stacklm/train/trainer.py train_step`. Includes files in a `templates` folder beside such a module.
    """
    files = sorted(set().union(*(import_closure(module, root) for module in modules)))
    sources = {file: (root / file).read_text(encoding="utf-8") for file in files}
    documented = {Path(file).parent for file, source in sources.items() if _analyse(source, False)[2]}
    read = {file: _analyse(source, Path(file).parent in documented)[1] for file, source in sources.items()}
    found = {f"{file} {name}": digest for file, named in read.items() for name, digest in named.items()}
    for path in {path for file in files for path in (root / file).parent.glob("templates/*")}:
        found[f"{path.relative_to(root).as_posix()} {TEXT}"] = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    return dict(sorted(found.items()))


def file_units(file: Path) -> dict[str, str]:
    """A hash of each function, class and constant of a file and of all modules that it imports from its folder, by file and name.

    For other packages the version is included, except for torch and numpy, which are already part of every identity. Raises
    `FileNotFoundError` and `SyntaxError`.
    """
    files, elsewhere = beside(file)
    found = {f"{name} {unit}": digest for name, path in files.items() for unit, digest in _units_of(path).items()}
    return dict(sorted(found.items())) | package_versions(elsewhere)


def beside(file: Path) -> tuple[dict[str, Path], set[str]]:
    """A file and the modules that it imports from its folder, by relative path, found from the import statements; and the names
    of the packages that it imports from elsewhere."""
    folder = file.parent
    found: dict[str, Path] = {}
    elsewhere: set[str] = set()
    queue = [(file, "")]
    while queue:
        path, package = queue.pop()
        if (name := path.relative_to(folder).as_posix()) in found:
            continue
        found[name] = path
        for module in _imported(ast.parse(path.read_text(encoding="utf-8"), path.name), package):
            parts = module.split(".")
            there = False
            for i in range(1, len(parts) + 1):
                base = folder.joinpath(*parts[:i])
                for source, own in ((base.with_suffix(".py"), parts[: i - 1]), (base / "__init__.py", parts[:i])):
                    if source.is_file():
                        queue.append((source, ".".join(own)))
                        there = True
            if not there:
                elsewhere.add(parts[0])
    return found, elsewhere


def package_versions(names: Iterable[str]) -> dict[str, str]:
    """The versions of the installed distributions that provide these packages, except stacklm, torch and numpy."""
    names = sorted({*names} - {PACKAGE, "torch", "numpy"} - sys.stdlib_module_names)
    owners = _owners() if names else {}
    return {f"version of {one}": importlib.metadata.version(one) for name in names for one in owners.get(name, [])}


@cache
def _owners() -> Mapping[str, list[str]]:
    """The installed distributions by package name; the lookup takes a tenth of a second."""
    return importlib.metadata.packages_distributions()


def _units_of(path: Path) -> dict[str, str]:
    return _analyse(path.read_text(encoding="utf-8"), False)[1]


def _imported(tree: ast.AST, package: str) -> Iterator[str]:
    """The full names of the modules that a module in `package` may import."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join(filter(None, [*above, node.module]))
            yield from filter(None, (module, *(f"{module}.{alias.name}".lstrip(".") for alias in node.names)))


def digest(plain: Any) -> str:
    """The SHA-256 of plain values, such as units with their hashes; independent of key order."""
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _source(module: str, root: Path) -> str | None:
    """The file of a module of this package, as a POSIX path relative to the root; None for any other module."""
    if module.partition(".")[0] != PACKAGE:
        return None
    base = (root / PACKAGE).joinpath(*module.split(".")[1:])
    for path in (base.with_suffix(".py"), base / "__init__.py"):
        if path.is_file() and path != (root / PACKAGE).with_suffix(".py"):
            return path.relative_to(root).as_posix()
    return None


@cache
def _analyse(source: str, docstrings: bool) -> tuple[frozenset[str], dict[str, str], bool]:
    """The modules a source file may import, the hash of each unit (with or without docstrings), and whether it reads docstrings."""
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
    """Removes code that is only for type checkers, and docstrings unless they count."""

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
    """Add the shapes of a module or class and of its direct definitions, by qualified name."""
    rest: list[Any] = []  # names in order, and all other executed code
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
    """A syntax tree as nested lists, equal in every Python version; `annotations` says whether annotations count here."""
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
