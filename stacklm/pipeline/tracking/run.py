"""What a pretraining is, as far as files tell.

The facts that hold from its first step (settings, data, code, the start) are noted in the state folder when it begins;
a run that was trained elsewhere and came through DVC has them read from its outputs.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stacklm.config.model import Model
from stacklm.config.schema import read
from stacklm.files import read_json, read_jsonl, sha256, write_json
from stacklm.pipeline.project import Project
from stacklm.pipeline.stages import stage

PRETRAIN = stage("pretrain")


@dataclass(frozen=True)
class Run:
    """One pretraining of `model`: growing in a work folder, or `published` in the project's outputs.

    `fingerprint` is the identity of its settings, inputs and code; the run in MLflow is found by it.
    """

    project: Project
    model: str
    fingerprint: str
    metrics: Path
    timing: Path
    published: bool

    @classmethod
    def growing(cls, project: Project, model: str, fingerprint: str, work: Path) -> Run:
        return cls(project, model, fingerprint, work / "metrics.jsonl", work / "timing.jsonl", published=False)

    @classmethod
    def finished(cls, project: Project) -> Iterator[Run]:
        """The runs whose outputs are complete in the project."""
        for record in sorted((project.root / PRETRAIN.record("*")).parent.glob(Path(PRETRAIN.record("*")).name)):
            model = record.stem.partition("@")[2]
            outputs = PRETRAIN.paths(PRETRAIN.writes, project.root, model)
            if all(path.exists() for path in outputs.values()):
                fingerprint = read_json(record)["fingerprint"]
                yield cls(project, model, fingerprint, outputs["trained"] / "metrics.jsonl", outputs["timing"], published=True)

    @property
    def trained(self) -> Path:
        return self.project.root / PRETRAIN.writes["trained"].format(model=self.model)

    def note(self, kind: str) -> Path:
        """The file of the state folder that keeps this run's `facts`, `receipt` or `lock`."""
        return self.project.state / "tracking" / f"{self.fingerprint[:16]}.{kind}"

    def facts(self) -> dict[str, Any]:
        """What was noted when the run began, or else what its files tell now."""
        noted = self.note("facts")
        return read_json(noted) if noted.exists() else self._collect(self._record(PRETRAIN.record(self.model)))

    def begin(self, record: Mapping[str, Any]) -> None:
        """Note the facts, `record` being the leaf's; a resumed run keeps those it began with."""
        if not self.note("facts").exists():
            write_json(self.note("facts"), {**self._collect(record), "git": _git(self.project.root)})

    def evaluation(self) -> dict[str, Any] | None:
        """The published evaluation, if it is of exactly these weights."""
        evaluate = stage("evaluate")
        inputs = self._record(evaluate.record(self.model)).get("inputs", {})
        path = self.project.root / evaluate.writes["evaluation"].format(model=self.model)
        ours = self.trained.exists() and inputs.get(self.trained.relative_to(self.project.root).as_posix()) == sha256(self.trained)
        return read_json(path) if ours and path.exists() else None

    def report(self) -> Path | None:
        """The folder of the published report, if it is of exactly the models that are published now."""
        compare = stage("compare")
        inputs = self._record(compare.record()).get("inputs", {})
        path, models = self.project.root / compare.writes["report"], self.project.root / compare.reads["trained"]
        return path if path.exists() and inputs.get(compare.reads["trained"]) == sha256(models) else None

    def _record(self, path: str) -> dict[str, Any]:
        record = self.project.root / path
        return read_json(record) if record.exists() else {}

    def _collect(self, record: Mapping[str, Any]) -> dict[str, Any]:
        entry = record["params"][f"models.{self.model}"]
        train = record["params"]["train"]
        upstream = [self._record(stage(name).record()).get("params", {}) for name in ("download", "tokenizer")]
        settings = {key: value for params in upstream for key, value in params.items()}
        data = _data(self.project.root, settings.get("data", {}))
        rows = read_jsonl(self.timing)
        ended = self.timing.stat().st_mtime if rows else time.time()
        return {
            "fingerprint": self.fingerprint,
            "model": self.model,
            "started": round(ended - (rows[-1]["seconds"] if rows else 0), 3),
            "steps": train["steps"],
            "params": flatten({**entry, "train": train, **settings}),
            "size": _size(read(Model, entry), data["vocab_size"], train["context"]),
            "data": data,
            "code": record["code"],
            "versions": record["versions"],
        }


def flatten(tree: Any, key: str = "") -> dict[str, Any]:
    """Nested settings as one level of dotted keys: `architecture.stacks.0.layers`."""
    if isinstance(tree, Mapping) or (isinstance(tree, list) and any(isinstance(item, Mapping) for item in tree)):
        items = tree.items() if isinstance(tree, Mapping) else enumerate(tree)
        return {k: v for name, item in items for k, v in flatten(item, f"{key}.{name}" if key else str(name)).items()}
    return {key: ", ".join(map(str, tree)) if isinstance(tree, list) else tree}


def _size(model: Model, vocab_size: int, context: int) -> dict[str, int]:
    """Parameters and FLOPs a token, under the names of MLflow's metrics."""
    from stacklm.model.count import count

    counts = count(model.architecture, vocab_size, context)
    body = sum(number for role, number in counts.parameters.items() if role not in ("embedding", "head"))
    return {
        "model/parameters": counts.total,
        "model/body_parameters": body,
        "model/forward_flops_per_token": counts.forward_flops_per_token,
        "model/training_flops_per_token": counts.training_flops_per_token,
    }


def _data(root: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The shards a run reads: what they are of, their identity and their sizes."""
    path = root / PRETRAIN.reads["shards"] / "manifest.json"
    manifest = read_json(path)
    source = settings.get("source", {"kind": "unknown"})
    return {
        "name": source.get("name", source["kind"]),
        "source": source,
        "sha256": sha256(path),
        "tokenizer": manifest["tokenizer"],
        "vocab_size": manifest["vocab_size"],
        "dtype": manifest["dtype"],
        "splits": {
            split: {unit: sizes[unit] for unit in ("tokens", "documents", "bytes", "words")}
            for split, sizes in manifest["splits"].items()
        },
    }


def _git(root: Path) -> dict[str, Any]:
    """The commit that is checked out, and whether tracked files differ from it; empty outside git."""

    def ask(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {
            "commit": ask("rev-parse", "HEAD"),
            "branch": ask("rev-parse", "--abbrev-ref", "HEAD"),
            "dirty": bool(ask("status", "--porcelain", "--untracked-files=no")),
        }
    except (OSError, subprocess.CalledProcessError):
        return {}
