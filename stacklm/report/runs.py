"""What training and evaluation left behind for each model, checked for being comparable."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stacklm.config.model import Model
from stacklm.config.schema import plain
from stacklm.config.train import Train
from stacklm.files import read_json, read_jsonl
from stacklm.model.count import Counts, count


@dataclass(frozen=True)
class Run:
    """One trained and evaluated model.

    `metrics` and `timing` are rows by optimizer step; `timing` is empty where it was not measured.
    """

    name: str
    model: Model
    counts: Counts
    metrics: list[dict[str, Any]]
    timing: list[dict[str, Any]]
    evaluation: dict[str, Any]


def load_runs(
    models: Mapping[str, Model], config: Train, manifest: Mapping[str, Any], trained: Path, evaluations: Path, timing: Path
) -> list[Run]:
    """Read the files of the named models and of no others.

    Raises `FileNotFoundError` for a model without results, and `ValueError` for one whose results are not of these
    settings or not of the same text as the others': such numbers must not stand side by side.
    """
    runs = [_load_run(name, model, config, manifest, trained / name, evaluations, timing) for name, model in models.items()]
    for run in runs[1:]:
        for split in ("valid", "test"):
            sizes = [{unit: r.evaluation[split][unit] for unit in ("tokens", "bytes", "words")} for r in (runs[0], run)]
            if sizes[0] != sizes[1]:
                raise ValueError(
                    f"models {runs[0].name!r} and {run.name!r} were scored on different {split} texts, {sizes[0]} and {sizes[1]}: "
                    "evaluate both again"
                )
    return runs


def _load_run(
    name: str, model: Model, config: Train, manifest: Mapping[str, Any], trained: Path, evaluations: Path, timing: Path
) -> Run:
    evaluation = evaluations / f"{name}.json"
    for path in (trained / "config.json", trained / "metrics.jsonl", evaluation):
        if not path.exists():
            raise FileNotFoundError(f"model {name!r} has no results: {path} is missing; train and evaluate the model first")
    wanted = {"architecture": plain(model.architecture), "vocab_size": manifest["vocab_size"], "context": config.context}
    found = read_json(trained / "config.json")
    for key, value in wanted.items():
        if found[key] != value:
            raise ValueError(f"model {name!r} was trained with {key} {found[key]}, but the settings say {value}: train it again")
    metrics = read_jsonl(trained / "metrics.jsonl")
    steps = metrics[-1]["step"] if metrics else 0
    if steps != config.steps:
        raise ValueError(f"model {name!r} was trained for {steps} steps, but the settings say {config.steps}: train it again")
    times = read_jsonl(timing / f"{name}.jsonl")
    return Run(
        name=name,
        model=model,
        counts=count(model.architecture, manifest["vocab_size"], config.context),
        metrics=metrics,
        timing=times if times and times[-1]["step"] == steps else [],  # of a run cut short or of another length
        evaluation=read_json(evaluation),
    )
