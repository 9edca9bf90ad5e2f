"""Find trained models of a project or of MLflow by name; export, register and load them, comparing all fingerprints."""

from __future__ import annotations

import contextlib
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stacklm.code import digest
from stacklm.config.params import load as load_params
from stacklm.config.schema import ParamsError, listed, nearest, plain
from stacklm.export.card import training_tokens
from stacklm.files import read_json, sha256
from stacklm.pipeline.code import code_files, joined
from stacklm.pipeline.project import Project
from stacklm.pipeline.stages import Instance, instances, stage
from stacklm.pipeline.tracking.run import Pretraining, as_params
from stacklm.pipeline.tracking.store import connect, prepare, tracking_uri
from stacklm.pipeline.tracking.sync import sync
from stacklm.pipeline.tracking.weights import CHAMPION, DIGEST, MODEL_ID, TOKENIZER, TRAINED, WEIGHTS, WEIGHTS_DIGEST, register_as
from stacklm.units import count

if TYPE_CHECKING:
    from stacklm.data.tokenizer import Tokenizer
    from stacklm.model.build import ModelConfig
    from stacklm.model.layers import LanguageModel

SAME, CHANGED, UNKNOWN = "as recorded", "changed since", "unknown here"
MAY_CHANGE = ("data", "code")
"""What training reads and a trained model does not need."""


@dataclass(frozen=True)
class Loaded:
    """A trained model, its tokenizer and config, `facts` for display; `verdicts` compare the digests `found` with its record."""

    model: LanguageModel
    tokenizer: Tokenizer
    config: ModelConfig
    facts: dict[str, str]
    found: dict[str, str | None]
    verdicts: dict[str, str]


def find(project: Project, name: str | None = None) -> Pretraining:
    """The finished training run of that name, such as `dense-2`; for `dense` that of its first seed, for None the first of all.

    Raises `ParamsError`, which says what to do, if there is none.
    """
    trained = {one.item.run: one for one in Pretraining.finished(project)}
    known = {item.run: item for item in instances(load_params(project.params_file)) if item.stage.resumable}
    known |= {run: one.item for run, one in trained.items() if run not in known}  # of models that are no longer in params.yaml
    item = next((item for item in known.values() if name in (item.run, item.model, None)), None)
    if item is None:
        names = [item.model for item in known.values()]
        raise ParamsError(f"no model {name!r}; there are {listed(known)}{nearest(name, names)}")
    if item.run not in trained:
        raise ParamsError(f"{item.run} is not trained yet: `dvc repro {item.address}` or `stacklm run-flow pretrain` trains it")
    return trained[item.run]


def export(project: Project, folder: Path, name: str, licence: str | None = None) -> None:
    """Write a trained model as a folder for `transformers`; see `stacklm.export.hf`."""
    from stacklm.export.hf import export_hf

    run = find(project, name)
    export_hf(folder, run.trained, tokenizer_of(project), run.card(licence))


def register(project: Project, name: str, alias: str, licence: str | None = None) -> str:
    """Register a trained model in MLflow under an alias, with its card; return its address.

    Raises `ParamsError` for the alias that the comparison sets, and `RuntimeError` with the message of MLflow's errors.
    """
    if alias == CHAMPION:
        raise ParamsError(f"--alias {CHAMPION}: the comparison sets it; choose another, such as production")
    run = find(project, name)
    with _plainly(name):
        sync(run)
        return register_as(run, alias, licence)


def load_parts(target: str) -> tuple[LanguageModel, Tokenizer, ModelConfig]:
    """`stacklm.load`: the parts that `load` finds, with a warning if data or code changed since training."""
    found = load(target)
    if changed := [name for name, verdict in found.verdicts.items() if verdict == CHANGED]:
        warnings.warn(f"{target}: {listed(changed)} changed since it was trained", stacklevel=3)
    return found.model, found.tokenizer, found.config


def load(target: str, project: Project | None = None) -> Loaded:
    """Load the model of a name such as `dense-2`, of an MLflow run id, or of `models:/NAME@ALIAS`, in evaluation mode.

    Raises `StoreError` if weights, tokenizer, settings or record differ from those of the training. Data and code may have
    changed since; the verdicts say so.
    """
    project = project or Project.find()
    if re.fullmatch(r"[0-9a-f]{32}|models:/.+", target):
        with _plainly(target):
            return _of_mlflow(project, target)
    run = find(project, target)
    record, facts, evaluation = read_json(project.root / run.item.record), run.facts(), run.evaluation()
    evaluated = project.root / replace(run.item, stage=stage("evaluate")).record
    trained = run.trained.relative_to(project.root).as_posix()
    recorded = {
        "record": [record["fingerprint"]],
        "weights": [read_json(evaluated)["inputs"][trained]] if evaluated.exists() else [],
        "tokenizer": [facts["data"]["tokenizer"]],
        "data": [facts["data"]["sha256"]],
        "code": [record["code"], *(one["code"] for one in record.get("accepted", []))],
    }
    found = {
        "record": digest({key: value for key, value in record.items() if key not in ("fingerprint", "accepted")}),
        "weights": sha256(run.trained),
        **_now(project, run.item),
    }
    bits = evaluation["test"]["bits_per_byte"] if evaluation else None
    return _loaded(run.trained, tokenizer_of(project), facts["params"], bits, trained, recorded, found)


def _of_mlflow(project: Project, target: str) -> Loaded:
    from mlflow.artifacts import download_artifacts

    client, experiment = connect(project)
    if alias := re.fullmatch(r"models:/([^@/]+)@(.+)", target):
        identity = client.get_model_version_by_alias(*alias.groups()).tags.get(MODEL_ID)
    elif target.startswith("models:/"):
        identity = target.removeprefix("models:/")
    else:
        logged = client.search_logged_models([experiment], filter_string=f"source_run_id = '{target}'")
        identity = logged[0].model_id if logged else None
    if identity is None:
        raise ParamsError(f"{target}: no model of stacklm is logged there; `stacklm sync` logs all trained models")
    model = client.get_logged_model(identity)
    run = client.get_run(str(model.source_run_id)).data
    item = Instance(stage("pretrain"), run.tags["model"], int(run.tags["seed"]))
    recorded = {
        "weights": [model.tags[WEIGHTS_DIGEST]] if WEIGHTS_DIGEST in model.tags else [],
        "tokenizer": [model.tags[DIGEST].partition(" ")[2]],
        **{name: [run.tags[f"sha256.{name}"]] for name in ("data", "code")},
    }
    with tempfile.TemporaryDirectory() as copy:
        folder = Path(download_artifacts(model.artifact_location, dst_path=copy, tracking_uri=tracking_uri(project)))
        data = next(folder.rglob(TRAINED)).parent
        found = {"weights": sha256(data / TRAINED / WEIGHTS), **_now(project, item)}
        bits = run.metrics.get("bits_per_byte/test")
        return _loaded(data / TRAINED, data / TOKENIZER, run.params, bits, f"models:/{identity}", recorded, found)


def _loaded(
    trained: Path,
    tokenizer: Path,
    params: Mapping[str, Any],
    bits: float | None,
    path: str,
    recorded: Mapping[str, list[str]],
    found: Mapping[str, str | None],
) -> Loaded:
    """Load a model and compare the digests `found` with those `recorded`, in full or as prefixes; `params` are as in MLflow."""
    from stacklm.data.tokenizer import Tokenizer
    from stacklm.model.store import StoreError, load_model

    words = Tokenizer.load(tokenizer)
    model, config = load_model(trained, words.digest)
    settings = as_params({"architecture": plain(config.architecture), "train": {"context_length": config.context_length}})
    made_of = {key: str(params.get(key)) for key in settings}
    recorded = {**recorded, "settings": [digest(made_of)]}
    found = {**found, "tokenizer": words.digest, "settings": digest({key: str(value) for key, value in settings.items()})}
    verdicts = {}
    for name, known in recorded.items():
        there = found[name]
        verdicts[name] = SAME if there and any(map(there.startswith, known)) else CHANGED if there and known else UNKNOWN
    if wrong := [name for name, verdict in verdicts.items() if verdict == CHANGED and name not in MAY_CHANGE]:
        raise StoreError(f"{path}: {listed(wrong)} not as recorded; restore the recorded version, or train again")
    source = params.get("data.source.name") or params.get("data.source.kind")
    facts = {
        "parameters": count(sum(parameter.numel() for parameter in model.parameters())),
        "trained on": f"{count(training_tokens(params))} tokens of {source}",
        "bits per byte, test": "unknown" if bits is None else f"{bits:.4f}",
        "path": path,
    }
    return Loaded(model.eval(), words, config, facts, found, verdicts)


def _now(project: Project, item: Instance) -> dict[str, str | None]:
    """The digests of the tokens and the code that training would read now; None where they are missing."""
    manifest, params = project.root / stage("pretrain").reads["shards"] / "manifest.json", load_params(project.params_file)
    return {
        "data": sha256(manifest) if manifest.exists() else None,
        "code": digest(joined(code_files(project, item, params))) if item.model in params.models else None,
    }


@contextlib.contextmanager
def _plainly(what: str) -> Iterator[None]:
    """Turn MLflow's errors into a `RuntimeError` with their message."""
    prepare()
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        raise RuntimeError(f"{what}: {error.message}") from None


def tokenizer_of(project: Project) -> Path:
    """The folder of the project's tokenizer, which all its models share."""
    return project.root / stage("tokenizer").writes["tokenizer"]
