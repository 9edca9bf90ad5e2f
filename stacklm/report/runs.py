"""Reads the results of training and evaluation of each model and checks that they are comparable."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stacklm.config.model import Model
from stacklm.config.schema import plain
from stacklm.config.train import Train
from stacklm.files import read_json, read_jsonl

if TYPE_CHECKING:
    from stacklm.model.count import Counts


@dataclass(frozen=True)
class Result:
    """The results of one model, trained with one seed and evaluated.

    `metrics` and `timing` are rows by optimizer step; `timing` is empty if it was not measured.
    """

    name: str
    seed: int
    model: Model
    counts: Counts
    metrics: list[dict[str, Any]]
    timing: list[dict[str, Any]]
    evaluation: dict[str, Any]

    @property
    def run(self) -> str:
        return f"{self.name}-{self.seed}"


def timing_of(trained: Path, timing: Path) -> list[dict[str, Any]]:
    """Return the rows of a timing file if it belongs to exactly these weights, else none: DVC restores models, but not times."""
    rows, config = read_jsonl(timing), trained / "config.json"
    ours = rows and config.exists() and rows[-1].get("model_sha256") == read_json(config).get("sha256")
    return rows if ours else []


def by_model(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Group results by model, one per seed."""
    return {name: [one for one in results if one.name == name] for name in dict.fromkeys(result.name for result in results)}


def load_results(
    models: Mapping[str, Model],
    seeds: Sequence[int],
    config: Train,
    manifest: Mapping[str, Any],
    trained: Path,
    evaluations: Path,
    timing: Path,
) -> list[Result]:
    """Read the results of only the named models, trained with these seeds.

    Raises `FileNotFoundError` for a model without results, and `ValueError` if its results are from other settings or from
    another text than those of the others, and thus not comparable.
    """
    results = [
        _load(name, seed, model, config, manifest, trained, evaluations, timing) for name, model in models.items() for seed in seeds
    ]
    first = results[0]
    for other in results[1:]:
        for split in ("valid", "test"):
            sizes = [{unit: one.evaluation[split][unit] for unit in ("tokens", "bytes", "words")} for one in (first, other)]
            if sizes[0] != sizes[1]:
                raise ValueError(
                    f"models {first.run!r} and {other.run!r} were scored on different {split} texts, {sizes[0]} and {sizes[1]}: "
                    "evaluate both again"
                )
    return results


def _load(
    name: str, seed: int, model: Model, config: Train, manifest: Mapping[str, Any], trained: Path, evaluations: Path, timing: Path
) -> Result:
    from stacklm.model.build import ModelConfig  # imports torch, not needed to read times
    from stacklm.model.count import count

    run = f"{name}-{seed}"
    trained, evaluation = trained / run, evaluations / f"{run}.json"
    for path in (trained / "config.json", trained / "metrics.jsonl", evaluation):
        if not path.exists():
            raise FileNotFoundError(f"model {run!r} has no results: {path} is missing; train and evaluate the model first")
    wanted = plain(ModelConfig(model.architecture, manifest["vocab_size"], config.context_length))
    found = read_json(trained / "config.json")
    for key, value in wanted.items():
        if found[key] != value:
            raise ValueError(f"model {run!r} was trained with {key} {found[key]}, but the settings say {value}: train it again")
    metrics = read_jsonl(trained / "metrics.jsonl")
    steps = metrics[-1]["step"] if metrics else 0
    if steps != config.max_steps:
        raise ValueError(f"model {run!r} was trained for {steps} steps, but the settings say {config.max_steps}: train it again")
    return Result(
        name=name,
        seed=seed,
        model=model,
        counts=count(model.architecture, manifest["vocab_size"], config.context_length),
        metrics=metrics,
        timing=timing_of(trained, timing / f"{run}.jsonl"),
        evaluation=read_json(evaluation),
    )
