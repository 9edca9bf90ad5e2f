"""Extract the code that a module of this package needs, as a flat folder of files with relative imports.

`transformers` copies such files with a model. Each file has only those functions, classes and constants of its module that the
first module needs, unchanged: an exported model runs the code that trained it.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

PACKAGE = "stacklm."
RENAMED = {
    '"stacklm::': 'f"{OPERATIONS}::',
    "torch.ops.stacklm.": "getattr(torch.ops, OPERATIONS).",
}
"""Torch registers custom operators by name. Those of an exported model get unique names, so that several exported models and this
package can be loaded together."""
OPERATIONS = 'OPERATIONS = "".join(c if c.isascii() and c.isalnum() else "_" for c in __name__)'


class Module:
    """One source file: the statements that define its names, and its imports."""

    def __init__(self, name: str) -> None:
        spec = find_spec(name)
        assert spec and spec.origin
        self.name, self.text = name, Path(spec.origin).read_text(encoding="utf-8")
        self.body = ast.parse(self.text).body
        self.defines: dict[str, ast.stmt] = {}
        self.imports: dict[str, tuple[str, str | None]] = {}
        for statement in self.body:
            match statement:
                case ast.FunctionDef(name=own) | ast.ClassDef(name=own):
                    self.defines[own] = statement
                case ast.Assign(targets=[ast.Name(id=own)]) | ast.AnnAssign(target=ast.Name(id=own)):
                    self.defines[own] = statement
                case ast.Import(names=names):
                    self.imports |= {(alias.asname or alias.name).partition(".")[0]: (alias.name, None) for alias in names}
                case ast.ImportFrom(module=str(module), names=names):
                    self.imports |= {alias.asname or alias.name: (module, alias.name) for alias in names}


def bundle(root: str) -> dict[str, str]:
    """Return Python source by file name: the code that the module `root` needs, and the whole of `root`."""
    needed: defaultdict[str, set[str]] = defaultdict(set)
    queue = [(root, name) for name in _read(root).defines]
    while queue:
        module, name = queue.pop()
        source = _read(module)
        if name in needed[module] or not (name in source.defines or name in source.imports):
            continue
        needed[module].add(name)
        if name in source.defines:
            queue += [(module, used) for used in _names(source.defines[name])]
            queue += [(module, used) for one in _attached(source, name) for used in _names(one)]
        elif source.imports[name][0].startswith(PACKAGE):
            queue.append((source.imports[name][0], str(source.imports[name][1])))
    return {f"{_flat(module)}.py": _text(_read(module), names) for module, names in sorted(needed.items())}


@cache
def _read(module: str) -> Module:
    return Module(module)


def _names(statement: ast.stmt) -> set[str]:
    return {node.id for node in ast.walk(statement) if isinstance(node, ast.Name)}


def _attached(source: Module, name: str) -> Iterator[ast.stmt]:
    """Yield the registrations of a custom operator in its module: `name.register_...(...)`, as a call or a decorator."""
    for statement in source.body:
        calls = statement.decorator_list if isinstance(statement, ast.FunctionDef) else [getattr(statement, "value", None)]
        for call in calls:
            target = call.func if isinstance(call, ast.Call) and isinstance(statement, ast.Expr) else call
            if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name) and target.value.id == name:
                yield statement


def _text(source: Module, names: set[str]) -> str:
    """Return the source of one module, reduced to these names."""
    own = names & source.defines.keys()
    kept = [source.defines[name] for name in own] + [one for name in own for one in _attached(source, name)]
    lines, parts, above = source.text.splitlines(), [], None
    for statement in source.body:
        documents = above in kept and isinstance(above, (ast.Assign, ast.AnnAssign)) and _is_text(statement)
        if statement in kept or documents or (above is None and _is_text(statement)):
            start = min(node.lineno for node in [statement, *getattr(statement, "decorator_list", [])])
            segment = "\n".join(lines[start - 1 : statement.end_lineno])
            parts.append(f"{parts.pop()}\n{segment}" if documents else segment)
        above = statement
    head = parts.pop(0) if _is_text(source.body[0]) else ""
    imports = [
        "from __future__ import annotations",
        *sorted(_import(name, *source.imports[name]) for name in names & source.imports.keys()),
    ]
    text = "\n\n\n".join([f"{head}\n\n" + "\n".join(imports), *parts]) + "\n"
    if any(word in text for word in RENAMED):
        text = text.replace("\n\n\n", f"\n\n{OPERATIONS}\n\n\n", 1)
        for word, other in RENAMED.items():
            text = text.replace(word, other)
    return text


def _import(name: str, module: str, own: str | None) -> str:
    """Return the statement that imports a name; from a neighbouring file if the name is of this package."""
    if own is None:
        return f"import {module}" if name == module.partition(".")[0] else f"import {module} as {name}"
    place = f".{_flat(module)}" if module.startswith(PACKAGE) else module
    return f"from {place} import {own}" + (f" as {name}" if name != own else "")


def _flat(module: str) -> str:
    """Return the file name of a module, without suffix: `stacklm.model.kernels.attention` is `model_kernels_attention`."""
    return module.removeprefix(PACKAGE).removeprefix("export.").replace(".", "_")


def _is_text(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant) and isinstance(statement.value.value, str)
