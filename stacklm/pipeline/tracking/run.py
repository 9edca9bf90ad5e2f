"""One training run, read from its files: metadata, the pipeline run it belongs to, metrics. Does not import MLflow.

Metadata known from the first step (settings, data, code, start time) is written to the state folder when the run starts; for a
run that was trained elsewhere and pulled by DVC it is read from the outputs.
"""

from __future__ import annotations

import getpass
import hashlib
import os
import platform
import re
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from stacklm.config.model import Model
from stacklm.config.schema import flatten, read
from stacklm.export.card import model_card
from stacklm.files import read_json, read_jsonl, sha256, write_json
from stacklm.pipeline.project import Project
from stacklm.pipeline.stages import Instance, stage
from stacklm.pipeline.tracking.store import LOCAL_PAGES, is_server, tracking_uri
from stacklm.pipeline.watchdog import entry_point
from stacklm.report.runs import timing_of

PRETRAIN = stage("pretrain")
FLOW_RUN, FLOW_RUN_ID = "STACKLM_FLOW_RUN", "STACKLM_FLOW_RUN_ID"
"""Environment variables that a flow sets for its stages: its name, and its id in Prefect."""

FINGERPRINT = "stacklm.fingerprint"
"""The tag that identifies a run."""

CONFIG = "config.json"
"""The file of a trained model with its settings and the digests of weights and tokenizer."""

POINTS = 2000
"""Approximate maximum of points per metric: more are not visible in a chart, and slow MLflow down."""

METRICS = {
    "valid_bits_per_byte": "bits_per_byte/valid",
    "train_loss": "loss/train",
    "valid_loss": "loss/valid",
    "lr": "optimizer/learning_rate",
    "grad_norm": "optimizer/grad_norm",
}
PROGRESS = {"tokens": "progress/tokens", "flops": "progress/training_flops", "seconds": "progress/seconds"}
"""X-axes of the validation loss. They have points at the same steps as the validation loss only: charts of grouped runs pair the
points of two metrics by their order."""
TIMING = {
    "tokens_per_second": ("speed/tokens_per_second", 1),
    "cpu_percent": ("system/cpu_utilization_percentage", 1),
    "system_memory_percent": ("system/system_memory_usage_percentage", 1),
    "system_memory_bytes": ("system/system_memory_usage_megabytes", 1e-6),
    "process_rss_bytes": ("system/process_memory_megabytes", 1e-6),
    "peak_memory_bytes": ("system/process_peak_memory_megabytes", 1e-6),
    "gpu_memory_bytes": ("system/gpu_0_memory_usage_megabytes", 1e-6),
}
"""Metric name in MLflow (the part before the slash is a group of charts) and unit conversion factor of each figure."""
HEALTH = "health/"
"""Prefix of metrics that are logged under their own names; which exist depends on the model."""


@dataclass(frozen=True)
class Pretraining:
    """One training run of a model and seed: in progress in a work folder, or `published` in the project's outputs.

    `fingerprint` identifies its settings, inputs and code, and its run in MLflow.
    """

    project: Project
    item: Instance
    fingerprint: str
    metrics: Path
    timing: Path
    published: bool

    @classmethod
    def growing(cls, project: Project, item: Instance, fingerprint: str, work: Path) -> Pretraining:
        return cls(project, item, fingerprint, work / "metrics.jsonl", work / "timing.jsonl", published=False)

    @classmethod
    def finished(cls, project: Project) -> Iterator[Pretraining]:
        """Yield the runs whose outputs in the project are complete."""
        pattern = project.root / Instance(PRETRAIN, "*").record
        for record in sorted(pattern.parent.glob(pattern.name)):
            name = re.fullmatch(r"pretrain@(.+)-(\d+)", record.stem)
            if not name:
                continue  # written by a version without seeds
            item = Instance(PRETRAIN, name[1], int(name[2]))
            outputs = item.paths(PRETRAIN.writes, project.root)
            if all(path.exists() for path in outputs.values()):
                fingerprint, timing = read_json(record)["fingerprint"], item.made(project.root)["timing"]
                yield cls(project, item, fingerprint, outputs["trained"] / "metrics.jsonl", timing, published=True)

    @property
    def trained(self) -> Path:
        return self.item.made(self.project.root)["trained"]

    def times(self) -> list[dict[str, Any]]:
        """Return the timing and memory rows so far; none if a published model was restored without them."""
        return timing_of(self.trained, self.timing) if self.published else read_jsonl(self.timing)

    def note(self, kind: str) -> Path:
        """Return the path of this run's `facts`, `receipt`, `lock` or MLflow `ids` in the state folder."""
        return self.project.state / "tracking" / f"{self.fingerprint[:16]}.{kind}"

    def facts(self) -> dict[str, Any]:
        """Return the metadata written when the run started, or else collected from its files now."""
        noted = self.note("facts")
        return read_json(noted) if noted.exists() else self._collect(self._record(self.item.record))

    def begin(self, record: Mapping[str, Any]) -> None:
        """Write the metadata; `record` is the stage runner's. A resumed run keeps the metadata of its start."""
        if not self.note("facts").exists():
            write_json(self.note("facts"), {**self._collect(record), "git": _git(self.project.root), "pipeline": pipeline_run()})

    def page(self) -> str | None:
        """Return the URL of the run in MLflow's UI; None if it is not in MLflow yet."""
        ids = self.note("ids")
        if not ids.exists():
            return None
        uri = tracking_uri(self.project)
        server = uri.rstrip("/") if is_server(uri) else LOCAL_PAGES
        return f"{server}/#/experiments/{read_json(ids)['experiment']}/runs/{read_json(ids)['run']}"

    @property
    def evaluation_file(self) -> Path:
        return replace(self.item, stage=stage("evaluate")).made(self.project.root)["evaluation"]

    def evaluation(self) -> dict[str, Any] | None:
        """Return the published evaluation; None if it is not of exactly these weights."""
        inputs = self._record(replace(self.item, stage=stage("evaluate")).record).get("inputs", {})
        path = self.evaluation_file
        ours = self.trained.exists() and inputs.get(self.trained.relative_to(self.project.root).as_posix()) == sha256(self.trained)
        return read_json(path) if ours and path.exists() else None

    def reports(self) -> dict[str, Path]:
        """Return the folders of the published report and of its timings; empty if they are not of exactly the published models."""
        compare = stage("compare")
        inputs = self._record(Instance(compare).record).get("inputs", {})
        paths = {"report": compare.writes["report"], "speed": compare.untracked_writes["speed"]}
        if inputs.get(compare.reads["trained"]) != sha256(self.project.root / compare.reads["trained"]):
            return {}
        return {name: self.project.root / path for name, path in paths.items() if (self.project.root / path).exists()}

    def card(self, licence: str | None = None) -> str:
        """Return the model card of a published run; `licence` is an SPDX identifier chosen by the model's owner."""
        compared = self.project.root / stage("compare").writes["comparison"]
        comparison = read_json(compared) if compared.exists() and self.reports() else None
        weights = read_json(self.trained / CONFIG)["sha256"]
        return model_card(self.facts(), self._settings(), weights, self.evaluation(), comparison, licence)

    def _settings(self) -> dict[str, Any]:
        """Return a params.yaml that reproduces the run, from the records of its stages."""
        items = (Instance(stage("download")), Instance(stage("tokenizer")), self.item)
        params = {key: value for item in items for key, value in self._record(item.record).get("params", {}).items()}
        seed, entry = params["train"].pop("seed"), params.pop(f"models.{self.item.model}")
        return {**params, "seeds": [seed], "models": {self.item.model: entry}, "evaluate": {}}

    def _record(self, path: str) -> dict[str, Any]:
        record = self.project.root / path
        return read_json(record) if record.exists() else {}

    def _collect(self, record: Mapping[str, Any]) -> dict[str, Any]:
        entry = record["params"][f"models.{self.item.model}"]
        train = record["params"]["train"]
        upstream = [self._record(Instance(stage(name)).record).get("params", {}) for name in ("download", "tokenizer")]
        settings = {key: value for params in upstream for key, value in params.items()}
        data = data_facts(self.project.root, settings.get("data", {}))
        rows = self.times()
        ended = self.timing.stat().st_mtime if rows else time.time()
        return {
            "fingerprint": self.fingerprint,
            "model": self.item.model,
            "seed": self.item.seed,
            "started": round(ended - (rows[-1]["seconds"] if rows else 0), 3),
            "steps": train["max_steps"],
            "params": as_params({**entry, "train": train, **settings}),
            "size": _size(read(Model, entry), data["vocab_size"], train["context_length"]),
            "data": data,
            "code": record["code"],
            "versions": record["versions"],
        }


def pipeline_run() -> dict[str, Any] | None:
    """Return the flow, `dvc repro` or `dvc exp run` that this stage belongs to; None if the stage was started on its own.

    `started` is in seconds since the epoch.
    """
    process = entry_point()
    if process is None:
        return None
    flow, experiment = os.environ.get(FLOW_RUN), os.environ.get("DVC_EXP_NAME")
    started = time.time() if flow else process.create_time()
    identity = [platform.node(), os.environ.get(FLOW_RUN_ID) or [process.pid, started], experiment]
    command = "stacklm run-flow" if flow else "dvc exp run" if experiment else "dvc repro"
    called = experiment or flow or time.strftime("%Y-%m-%d %H:%M", time.localtime(started))
    tags = {
        "dvc.experiment": experiment,
        "dvc.experiment.baseline": os.environ.get("DVC_EXP_BASELINE_REV"),
        "prefect.flow_run": flow,
        "prefect.flow_run_id": os.environ.get(FLOW_RUN_ID),
    }
    return {
        "identity": hashlib.sha256(repr(identity).encode()).hexdigest(),
        "name": f"{command} · {called}",
        "command": command,
        "started": round(started, 3),
        "tags": {name: value for name, value in tags.items() if value},
    }


def user() -> str:
    """Return the user name for MLflow; `unknown` if the system has none."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "unknown"


class Point(NamedTuple):
    """One point of a metric, after `seconds` of training."""

    key: str
    step: int
    value: float
    seconds: float


def points(metrics: Sequence[Mapping[str, Any]], timing: Sequence[Mapping[str, Any]], steps: int) -> list[Point]:
    """Return all points of a run of `steps` optimizer steps. Appending rows only appends points to each metric."""
    at, passed = (np.array([0, *(row[key] for row in timing)], float) for key in ("step", "seconds"))

    def clock(step: int) -> float:
        return float(np.interp(step, at, passed))

    timed = timing[-1]["step"] if timing else -1
    validated = [
        {**row, "seconds": clock(row["step"]) if row["step"] <= timed else None}
        for row in metrics
        if row.get("valid_bits_per_byte") is not None
    ]
    curves = [(row_key, key, 1, metrics) for row_key, key in METRICS.items()]
    curves += [(row_key, key, 1, validated) for row_key, key in PROGRESS.items()]
    curves += [(row_key, key, factor, timing) for row_key, (key, factor) in TIMING.items()]
    curves += [(key, key, 1, metrics) for key in dict.fromkeys(key for row in metrics for key in row) if key.startswith(HEALTH)]
    return [
        Point(key, row["step"], row[row_key] * factor, clock(row["step"]))
        for row_key, key, factor, rows in curves
        for row in _thin((row for row in rows if row.get(row_key) is not None), steps)
    ]


def as_params(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings as MLflow parameters."""
    return {key: ", ".join(map(str, value)) if isinstance(value, list) else value for key, value in flatten(settings).items()}


def _size(model: Model, vocab_size: int, context: int) -> dict[str, int]:
    """Return parameters and FLOPs per token by MLflow metric name."""
    from stacklm.model.count import count

    counts = count(model.architecture, vocab_size, context)
    body = sum(number for role, number in counts.parameters.items() if role not in ("embedding", "head"))
    return {
        "model/parameters": counts.total,
        "model/body_parameters": body,
        "model/forward_flops_per_token": counts.forward_flops_per_token,
        "model/training_flops_per_token": counts.training_flops_per_token,
    }


def data_facts(root: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return source, hash and sizes of the shards that a run reads."""
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
    """Return commit and branch checked out, and whether tracked files differ from the commit; empty outside git."""

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


def _thin(rows: Iterator[Mapping[str, Any]], steps: int) -> Iterator[Mapping[str, Any]]:
    """Yield the first row in every `steps / POINTS` steps, and the row of the last step."""
    width = -(-steps // POINTS)
    bucket = -1
    for row in rows:
        if row["step"] // width != bucket or row["step"] == steps:
            bucket = row["step"] // width
            yield row
