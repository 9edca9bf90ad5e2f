"""The trained models of a project, found by name, for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stacklm.config.schema import ParamsError, listed, nearest
from stacklm.export.card import model_card
from stacklm.files import read_json
from stacklm.model.store import CONFIG
from stacklm.pipeline.project import Project
from stacklm.pipeline.stages import Instance, stage
from stacklm.pipeline.tracking.run import Pretraining


def find(project: Project, name: str) -> Pretraining:
    """The published training of that name, such as `dense-2`, or `dense` for its first seed. Raises `ParamsError`."""
    trained = list(Pretraining.finished(project))
    found = next((one for one in trained if name in (one.item.run, one.item.model)), None)
    if found is None:
        names = [one.item.run for one in trained]
        raise ParamsError(
            f"no trained model {name!r}; there are {listed(names) or 'none: `dvc repro` trains them'}{nearest(name, names)}"
        )
    return found


def card(run: Pretraining, licence: str | None = None) -> str:
    """The model card of a published training."""
    root = run.project.root
    compared = root / stage("compare").writes["comparison"]
    return model_card(
        run.facts(),
        _settings(run),
        read_json(run.trained / CONFIG)["sha256"],
        run.evaluation(),
        read_json(compared) if run.reports() and compared.exists() else None,
        licence,
    )


def _settings(run: Pretraining) -> dict[str, Any]:
    """A params.yaml that repeats the training, from the records of its stages."""
    items = [Instance(stage(name)) for name in ("download", "tokenizer")] + [run.item]
    params = {key: value for item in items for key, value in read_json(run.project.root / item.record)["params"].items()}
    seed, entry = params["train"].pop("seed"), params.pop(f"models.{run.item.model}")
    return {**params, "seeds": [seed], "models": {run.item.model: entry}, "evaluate": {}}


def export(project: Project, folder: Path, name: str, licence: str | None = None) -> None:
    """Write the folder for `transformers` of a published model; see `stacklm.export.hf`."""
    from stacklm.export.hf import export_hf

    run = find(project, name)
    export_hf(folder, run.trained, project.root / stage("tokenizer").writes["tokenizer"], card(run, licence))
