"""The table of stages: the one place where the pipeline's graph is written down.

`dvc.yaml` is generated from it (`stacklm dvc-yaml`), the Prefect flow follows it, and `stacklm stage NAME` calls
its functions. A stage is a plain typed function of an inner ring that is called by keyword with its sections of
the settings, the paths it reads and the paths it must write. `{model}` stands for a model's name.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stacklm.code import source_root, units
from stacklm.config.params import Params, section
from stacklm.config.train import passes

CODE = "out/code"
"""The folder of the files about the code of each stage, which the stage that always runs writes."""


@dataclass(frozen=True)
class Stage:
    """One step of the pipeline.

    `params` maps arguments of `function` to dotted keys of params.yaml; `reads` and `writes` map arguments to
    paths. `untracked_reads` and `untracked_writes` are paths of figures that vary between equal runs, such as times: DVC does
    not know of them, they make nothing stale and are not restored. A `resumable` function also gets `work`, a folder that
    outlives a kill, and `earlier` ones.

    Of a section in `uses` the function gets only what a callable keeps. DVC runs the stage after any change of that
    section, since it refuses keys that are left at their defaults; where nothing that is kept has changed, the earlier
    result is published again and not recomputed. Arguments in `checks` are inputs that the function examines before it
    begins and that do not change the result.
    """

    name: str
    function: str
    params: Mapping[str, str]
    writes: Mapping[str, str]
    reads: Mapping[str, str] = field(default_factory=dict)
    untracked_reads: Mapping[str, str] = field(default_factory=dict)
    untracked_writes: Mapping[str, str] = field(default_factory=dict)
    metrics: tuple[str, ...] = ()
    uses: Mapping[str, Callable[[Any], Any]] = field(default_factory=dict)
    checks: tuple[str, ...] = ()
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

    def made(self, root: Path, model: str | None = None) -> dict[str, Path]:
        """All that the stage writes, tracked or not, by argument."""
        return self.paths({**self.writes, **self.untracked_writes}, root, model)

    def settings(self, params: Params, model: str | None = None) -> dict[str, Any]:
        """What the function gets of the settings, by argument."""
        sections = {argument: section(params, key.format(model=model)) for argument, key in self.params.items()}
        return {argument: self.uses.get(argument, lambda whole: whole)(found) for argument, found in sections.items()}

    def record(self, model: str | None = None) -> str:
        """The path of the note on what the stage was made from. No stage reads it: code may change and outputs not."""
        return f"out/records/{self.address(model)}.json"

    def code(self, root: Path) -> dict[str, str]:
        """The code that can change what the stage makes: a hash of each function and class; see `stacklm.code`."""
        return units([self.function.partition(":")[0]], source_root(root))

    @property
    def code_file(self) -> str:
        """The path of the file that holds `code` for DVC to compare."""
        return f"{CODE}/{self.name}.json"


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
        params={"architecture": "models.{model}.architecture", "train": "train"},
        uses={"train": passes},
        reads={"shards": "out/shards"},
        writes={"certificate": "out/audits/{model}.json"},
        per_model=True,
        help="Test that one model, as it is and as it is trained, sees no token that it is to predict.",
    ),
    Stage(
        name="pretrain",
        function="stacklm.train.pretrain:pretrain",
        params={"config": "train", "model": "models.{model}"},
        reads={"shards": "out/shards", "certificate": "out/audits/{model}.json"},
        checks=("certificate",),
        writes={"trained": "out/models/{model}"},
        untracked_writes={"timing": "out/timing/{model}.jsonl"},
        per_model=True,
        resumable=True,
        help="Train one model from scratch.",
    ),
    Stage(
        name="evaluate",
        function="stacklm.evaluate.evaluate:evaluate",
        params={"config": "evaluate", "train": "train"},
        uses={"train": passes},
        reads={"trained": "out/models/{model}", "shards": "out/shards", "tokenizer": "out/tokenizer"},
        writes={"evaluation": "out/evaluations/{model}.json", "certificate": "out/certificates/{model}.json"},
        per_model=True,
        help="Audit one model's trained weights, score it on the whole valid and test sets, and let it write.",
    ),
    Stage(
        name="compare",
        function="stacklm.report.compare:compare",
        params={"models": "models", "config": "train"},
        reads={"trained": "out/models", "evaluations": "out/evaluations", "shards": "out/shards"},
        untracked_reads={"timing": "out/timing"},
        writes={
            "comparison": "out/comparison.json",
            "metrics": "out/metrics.json",
            "curves": "out/curves",
            "report": "out/report",
        },
        untracked_writes={"speed": "out/speed"},
        metrics=("metrics",),
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


def inputs_of(target: Stage, model: str | None, models: Mapping[str, Any]) -> Iterator[tuple[Stage, str | None]]:
    """The stage instances whose outputs one instance reads: those of its own model, or of all models if it has none."""
    names = upstream(target)
    for candidate, other in instances(models):
        if candidate.name in names and (other is None or model in (None, other)):
            yield candidate, other
