"""The table of stages: the only place where the pipeline's graph is defined.

`dvc.yaml` is generated from it (`stacklm dvc-yaml`), the Prefect flow follows it, and `stacklm stage NAME` calls
its functions. A stage is a plain typed function of an inner ring that is called by keyword with its sections of
the settings, the paths it reads and the paths it must write. `{model}` is replaced by a model's name, `{run}` by model
and seed, such as `dense-1`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from stacklm.code import source_root, units
from stacklm.config.params import Params, section
from stacklm.config.train import Train, passes

CODE = "out/code"
"""The folder of the code files of all stages, written by the always-run stage."""


def model_code_file(name: str) -> str:
    """The path of a model's code file, which lists the code that is not in this package; empty if there is none."""
    return f"{CODE}/models/{name}.json"


@dataclass(frozen=True, eq=False)
class Stage:
    """One step of the pipeline, run `per` model, per model and seed, or once.

    `params` maps arguments of `function` to dotted keys of params.yaml; `reads` and `writes` map arguments to
    paths. `untracked_reads` and `untracked_writes` are paths of values that vary between equal runs, such as times: DVC does
    not track them, so they make nothing stale and are not restored. A `resumable` function also gets `work`, a folder that
    survives a kill, and `earlier` ones.

    `uses` maps arguments to callables that reduce a section to what the function needs. DVC runs the stage after any change
    of that section, since it refuses keys that are left at their defaults; if the reduced section has not changed, the
    earlier result is reused and not recomputed. Arguments in `checks` are inputs that the function checks before it starts
    and that do not change the result.
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
    per: tuple[str, ...] = ()
    resumable: bool = False
    always: bool = False
    help: str = ""

    def load(self) -> Any:
        """Import and return the stage's function. Slow, since some import torch."""
        module, _, name = self.function.partition(":")
        return getattr(importlib.import_module(module), name)

    def code(self, root: Path) -> dict[str, str]:
        """The code that can change the stage's outputs: a hash of each function and class; see `stacklm.code`."""
        return units([self.function.partition(":")[0]], source_root(root))

    @property
    def code_file(self) -> str:
        """The path of the file that holds `code` for DVC to compare."""
        return f"{CODE}/{self.name}.json"


@dataclass(frozen=True)
class Instance:
    """A stage for one model, for one model and seed, or, if it runs once, for neither."""

    stage: Stage
    model: str | None = None
    seed: int | None = None

    @property
    def run(self) -> str:
        """Model and seed as in file names, such as `dense-1`; the model alone; or an empty string."""
        return "-".join(str(part) for part in (self.model, self.seed) if part is not None)

    @property
    def address(self) -> str:
        """The name in DVC and Prefect, such as `pretrain@dense-1`."""
        return f"{self.stage.name}@{self.run}" if self.stage.per else self.stage.name

    @property
    def record(self) -> str:
        """The path of the record of what it was made from. No stage reads it: code may change while outputs stay equal."""
        return f"out/records/{self.address}.json"

    @property
    def code_files(self) -> list[str]:
        """The paths of its code files: that of the stage, and that of its model."""
        return [self.stage.code_file, *([model_code_file(self.model)] if self.model else [])]

    def fill(self, text: str) -> str:
        """A path or a key of params.yaml with `{model}` and `{run}` replaced."""
        return text.format(model=self.model, run=self.run)

    def paths(self, which: Mapping[str, str], root: Path) -> dict[str, Path]:
        return {argument: root / self.fill(path) for argument, path in which.items()}

    def made(self, root: Path) -> dict[str, Path]:
        """The paths of all its outputs, tracked or not, by argument."""
        return self.paths({**self.stage.writes, **self.stage.untracked_writes}, root)

    def settings(self, params: Params) -> dict[str, Any]:
        """The settings that the function gets, by argument."""
        sections = {argument: section(params, self.fill(key)) for argument, key in self.stage.params.items()}
        if self.seed is not None:
            sections = {a: replace(one, seed=self.seed) if isinstance(one, Train) else one for a, one in sections.items()}
        return {argument: self.stage.uses.get(argument, lambda whole: whole)(found) for argument, found in sections.items()}


STAGES: tuple[Stage, ...] = (
    Stage(
        name="inputs",
        function="stacklm.data.inputs:list_all_inputs",
        params={"config": "data", "evaluate": "evaluate"},
        writes={"inputs": "out/inputs.json", "benchmarks": "out/benchmarks.json"},
        always=True,
        help="List the files of the data source and of benchmarks with sizes and hashes, so that changes are detected.",
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
        help="Train a byte-level BPE tokenizer on the train split.",
    ),
    Stage(
        name="shards",
        function="stacklm.data.encode:write_shards",
        params={},
        reads={"documents": "out/documents", "tokenizer": "out/tokenizer"},
        writes={"shards": "out/shards"},
        help="Tokenize every split into memory-mapped token shards.",
    ),
    Stage(
        name="audit",
        function="stacklm.audit.audit:audit",
        params={"architecture": "models.{model}.architecture", "train": "train"},
        uses={"train": passes},
        reads={"shards": "out/shards"},
        writes={"certificate": "out/audits/{model}.json"},
        per=("model",),
        help="Test that one model, by itself and in the form that is trained, sees no token that it must predict.",
    ),
    Stage(
        name="pretrain",
        function="stacklm.train.pretrain:pretrain",
        params={"config": "train", "model": "models.{model}"},
        reads={"shards": "out/shards", "certificate": "out/audits/{model}.json"},
        checks=("certificate",),
        writes={"trained": "out/models/{run}"},
        untracked_writes={"timing": "out/timing/{run}.jsonl"},
        per=("model", "seed"),
        resumable=True,
        help="Train one model from scratch with one seed.",
    ),
    Stage(
        name="evaluate",
        function="stacklm.evaluate.evaluate:evaluate",
        params={"config": "evaluate", "train": "train"},
        uses={"train": passes},
        reads={
            "trained": "out/models/{run}",
            "shards": "out/shards",
            "tokenizer": "out/tokenizer",
            "benchmarks": "out/benchmarks.json",
        },
        writes={"evaluation": "out/evaluations/{run}.json", "certificate": "out/certificates/{run}.json"},
        per=("model", "seed"),
        help="Audit one model's trained weights, score it on the valid and test sets and benchmarks, and sample text.",
    ),
    Stage(
        name="compare",
        function="stacklm.report.compare:compare",
        params={"models": "models", "seeds": "seeds", "config": "train"},
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
        help="Compare all models: one table, plots, a page.",
    ),
)


def stage(name: str) -> Stage:
    """The stage of that name. Raises `KeyError` with the known names."""
    for candidate in STAGES:
        if candidate.name == name:
            return candidate
    raise KeyError(f"no stage {name!r}; the stages are {', '.join(s.name for s in STAGES)}")


def instances(params: Params) -> Iterator[Instance]:
    """Every stage with every model and seed it runs for, in topological order.

    All models with the first seed come before those with the second, so that pairs of models are complete early.
    """
    for candidate in STAGES:
        models = list(params.models) if "model" in candidate.per else [None]
        seeds = params.seeds if "seed" in candidate.per else [None]
        yield from (Instance(candidate, model, seed) for seed in seeds for model in models)


def upstream(target: Stage) -> set[str]:
    """The names of the stages whose outputs `target` reads."""
    made = {path: s.name for s in STAGES for path in s.writes.values()}
    return {name for read in target.reads.values() for path, name in made.items() if path == read or path.startswith(read + "/")}


def inputs_of(target: Instance, params: Params) -> Iterator[Instance]:
    """The instances whose outputs `target` reads: those of its own model and seed, or of all if it has none."""
    names = upstream(target.stage)
    for other in instances(params):
        pairs = (other.model, target.model), (other.seed, target.seed)
        if other.stage.name in names and all(theirs is None or ours in (None, theirs) for theirs, ours in pairs):
            yield other
