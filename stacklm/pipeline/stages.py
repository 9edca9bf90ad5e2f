"""The table of stages: the one place where the pipeline's graph is written down.

`dvc.yaml` is generated from it (`stacklm dvc-yaml`), the Prefect flow follows it, and `stacklm stage NAME` calls
its functions. A stage is a plain typed function of an inner ring that is called by keyword with its sections of
the settings, the paths it reads and the paths it must write. `{model}` stands for a model's name.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

PACKAGE = "stacklm"


@dataclass(frozen=True)
class Stage:
    """One step of the pipeline.

    `params` maps arguments of `function` to dotted keys of params.yaml; `reads` and `writes` map arguments to
    paths. `peeks` are paths that are read but never make the stage stale: figures that vary between equal
    runs, such as times. A `resumable` function also gets `work`, a folder that outlives a kill, and `earlier` ones.
    """

    name: str
    function: str
    params: Mapping[str, str]
    writes: Mapping[str, str]
    reads: Mapping[str, str] = field(default_factory=dict)
    peeks: Mapping[str, str] = field(default_factory=dict)
    metrics: tuple[str, ...] = ()
    per_model: bool = False
    resumable: bool = False
    always: bool = False
    help: str = ""

    def load(self) -> Any:
        """Import and return the stage's function. Slow: some import torch."""
        module, _, name = self.function.partition(":")
        return getattr(importlib.import_module(module), name)

    def address(self, model: str | None = None) -> str:
        """The stage's name in DVC and Prefect, such as `pretrain@dense`."""
        return f"{self.name}@{model}" if self.per_model else self.name

    def paths(self, which: Mapping[str, str], root: Path, model: str | None = None) -> dict[str, Path]:
        return {argument: root / path.format(model=model) for argument, path in which.items()}

    def record(self, model: str | None = None) -> str:
        """The path of the note on what the stage was made from. No stage reads it: code may change and outputs not."""
        return f"out/records/{self.address(model)}.json"

    def code(self) -> list[str]:
        """The source files that can change what the stage makes, relative to the project's root, sorted."""
        return sorted(import_closure(self.function.partition(":")[0]))


STAGES: tuple[Stage, ...] = (
    Stage(
        name="inputs",
        function="stacklm.data.sources:list_inputs",
        params={"config": "data"},
        writes={"inputs": "out/inputs.json"},
        always=True,
        help="List the source's files with sizes and hashes, so that a change outside the project is seen.",
    ),
    Stage(
        name="download",
        function="stacklm.data.download:download",
        params={"config": "data"},
        reads={"inputs": "out/inputs.json"},
        writes={"documents": "out/documents"},
        help="Read the source into documents, drop exact duplicates, split into train, valid and test.",
    ),
    Stage(
        name="tokenizer",
        function="stacklm.data.tokenizer:train_tokenizer",
        params={"config": "tokenizer"},
        reads={"documents": "out/documents"},
        writes={"tokenizer": "out/tokenizer"},
        help="Learn a byte-level BPE vocabulary on the train split.",
    ),
    Stage(
        name="shards",
        function="stacklm.data.encode:write_shards",
        params={},
        reads={"documents": "out/documents", "tokenizer": "out/tokenizer"},
        writes={"shards": "out/shards"},
        help="Turn every split into memory-mapped token shards.",
    ),
    Stage(
        name="audit",
        function="stacklm.audit.audit:audit",
        params={"architecture": "models.{model}.architecture", "context": "train.context"},
        reads={"shards": "out/shards"},
        writes={"certificate": "out/audits/{model}.json"},
        per_model=True,
        help="Prove that one model, as it is and as it is trained, sees no token that it is to predict.",
    ),
    Stage(
        name="pretrain",
        function="stacklm.train.pretrain:pretrain",
        params={"config": "train", "model": "models.{model}"},
        reads={"shards": "out/shards", "certificate": "out/audits/{model}.json"},
        writes={"trained": "out/models/{model}", "timing": "out/timing/{model}.jsonl"},
        per_model=True,
        resumable=True,
        help="Train one model from scratch.",
    ),
    Stage(
        name="evaluate",
        function="stacklm.evaluate.evaluate:evaluate",
        params={"config": "evaluate"},
        reads={"trained": "out/models/{model}", "shards": "out/shards", "tokenizer": "out/tokenizer"},
        writes={"evaluation": "out/evaluations/{model}.json"},
        per_model=True,
        help="Score one model on the whole valid and test sets, and let it write.",
    ),
    Stage(
        name="compare",
        function="stacklm.report.compare:compare",
        params={"models": "models", "config": "train"},
        reads={"trained": "out/models", "evaluations": "out/evaluations", "shards": "out/shards"},
        peeks={"timing": "out/timing"},
        writes={"comparison": "out/comparison.json", "report": "out/report"},
        metrics=("comparison",),
        help="Put the models side by side: one table, plots, a page.",
    ),
)


def stage(name: str) -> Stage:
    """The stage of that name. Raises `KeyError` with the known names."""
    for candidate in STAGES:
        if candidate.name == name:
            return candidate
    raise KeyError(f"no stage {name!r}; the stages are {', '.join(s.name for s in STAGES)}")


def instances(models: Mapping[str, Any]) -> Iterator[tuple[Stage, str | None]]:
    """Every stage with every model it runs for, in an order that respects what each reads."""
    for candidate in STAGES:
        yield from ((candidate, model) for model in (models if candidate.per_model else (None,)))


def upstream(target: Stage) -> set[str]:
    """The names of the stages whose outputs `target` reads."""
    made = {path: s.name for s in STAGES for path in s.writes.values()}
    return {name for read in target.reads.values() for path, name in made.items() if path == read or path.startswith(read + "/")}


@cache
def import_closure(module: str) -> frozenset[str]:
    """The package's source files that importing `module` can execute, found from the import statements alone."""
    found: set[str] = set()
    queue = [module]
    while queue:
        name = queue.pop()
        path = _source(name)
        if path is None or path in found:
            continue
        found.add(path)
        queue.append(name.rpartition(".")[0])  # importing a module runs its parents' __init__
        tree = ast.parse((_package_root().parent / path).read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                queue.extend(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                queue.append(node.module)
                queue.extend(f"{node.module}.{alias.name}" for alias in node.names)
    return frozenset(found)


def _source(module: str) -> str | None:
    """The file of a module of this package, as a posix path from the project's root; None for anything else."""
    if module.partition(".")[0] != PACKAGE:
        return None
    base = _package_root().joinpath(*module.split(".")[1:])
    for path in (base.with_suffix(".py"), base / "__init__.py"):
        if path.is_file() and path != _package_root().with_suffix(".py"):
            return path.relative_to(_package_root().parent).as_posix()
    return None


def _package_root() -> Path:
    return Path(__file__).resolve().parent.parent
