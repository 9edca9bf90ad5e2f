"""The trained models of a project and of MLflow by their names: exported, registered, loaded with all fingerprints compared."""

from __future__ import annotations

import contextlib
import math
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
from stacklm.files import read_json, sha256
from stacklm.pipeline.code import code_files, joined
from stacklm.pipeline.project import Project
from stacklm.pipeline.stages import Instance, stage
from stacklm.pipeline.tracking.run import Pretraining, as_params
from stacklm.units import count

if TYPE_CHECKING:
    from stacklm.data.tokenizer import Tokenizer
    from stacklm.model.build import ModelConfig
    from stacklm.model.layers import LanguageModel

SAME, CHANGED, UNKNOWN = "as recorded", "changed since", "not known here"


@dataclass(frozen=True)
class Loaded:
    """A trained model, what belongs to it, and its `facts` for people. `verdicts` compare each part with what is on record."""

    model: LanguageModel
    tokenizer: Tokenizer
    config: ModelConfig
    facts: dict[str, Any]
    verdicts: dict[str, str]


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


def export(project: Project, folder: Path, name: str, licence: str | None = None) -> None:
    """Write the folder for `transformers` of a published model; see `stacklm.export.hf`."""
    from stacklm.export.hf import export_hf

    run = find(project, name)
    export_hf(folder, run.trained, _tokenizer(project), run.card(licence))


def register(project: Project, name: str, alias: str, licence: str | None = None) -> str:
    """Register a published model in MLflow under an alias, with its card; returns its address.

    Raises `ParamsError` for the alias that follows the comparison, and whatever MLflow raises.
    """
    from stacklm.pipeline.tracking.sync import sync
    from stacklm.pipeline.tracking.weights import CHAMPION, register_as

    if alias == CHAMPION:
        raise ParamsError(f"--alias {CHAMPION}: it follows the comparison; choose another, such as production")
    run = find(project, name)
    with _plainly(name):
        sync(run)
        return register_as(run, alias, licence)


def load_parts(target: str) -> tuple[LanguageModel, Tokenizer, ModelConfig]:
    """`stacklm.load`: what `load` finds, with a warning where data or code changed since the training."""
    found = load(target)
    if changed := [name for name, verdict in found.verdicts.items() if verdict == CHANGED]:
        warnings.warn(f"{target}: {listed(changed)} changed since it was trained", stacklevel=3)
    return found.model, found.tokenizer, found.config


def load(target: str, project: Project | None = None) -> Loaded:
    """The model of a name such as `dense-2`, of a run of MLflow by its id, or of `models:/NAME@ALIAS`, in evaluation mode.

    Raises `StoreError` where weights, tokenizer, settings or the record are not those that were trained. Data and code may have
    changed since; the verdicts say so.
    """
    project = project or Project.find()
    if re.fullmatch(r"[0-9a-f]{32}|models:/.+", target):
        with _plainly(target):
            return _of_mlflow(project, target)
    run = find(project, target)
    record, facts, evaluation = read_json(project.root / run.item.record), run.facts(), run.evaluation()
    identity = {key: value for key, value in record.items() if key not in ("fingerprint", "accepted")}
    evaluated = project.root / replace(run.item, stage=stage("evaluate")).record
    trained = run.trained.relative_to(project.root).as_posix()
    weights = read_json(evaluated)["inputs"].get(trained) if evaluated.exists() else None
    accepted = [one["code"] for one in record.get("accepted", [])]
    bits = evaluation["test"]["bits_per_byte"] if evaluation else None
    return _loaded(
        run.trained,
        _tokenizer(project),
        _facts(facts["params"], bits, trained),
        {
            "record": record["fingerprint"],
            "weights": weights,
            "settings": _settings(facts["params"]),
            "tokenizer": facts["data"]["tokenizer"],
        },
        {"record": digest(identity), "weights": sha256(run.trained)},
        {"data": [facts["data"]["sha256"]], "code": [facts["code"], *accepted]},
        _now(project, run.item),
    )


@contextlib.contextmanager
def _plainly(what: str) -> Iterator[None]:
    """MLflow's own errors become a `RuntimeError` with their message."""
    from stacklm.pipeline.tracking.store import prepare

    prepare()
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        raise RuntimeError(f"{what}: {error.message}") from None


def _of_mlflow(project: Project, target: str) -> Loaded:
    from mlflow.artifacts import download_artifacts

    from stacklm.pipeline.tracking.store import connect, tracking_uri
    from stacklm.pipeline.tracking.weights import DIGEST, MODEL_ID, TOKENIZER, TRAINED, WEIGHTS_DIGEST

    client, experiment = connect(project)
    if alias := re.fullmatch(r"models:/([^@/]+)@(.+)", target):
        identity = client.get_model_version_by_alias(*alias.groups()).tags.get(MODEL_ID)
    elif target.startswith("models:/"):
        identity = target.removeprefix("models:/")
    else:
        found = client.search_logged_models([experiment], filter_string=f"source_run_id = '{target}'")
        identity = found[0].model_id if found else None
    if identity is None:
        raise ParamsError(f"{target}: no model of stacklm is logged there; `stacklm sync` logs those that are trained")
    logged = client.get_logged_model(identity)
    tags, run = logged.tags, client.get_run(str(logged.source_run_id)).data
    with tempfile.TemporaryDirectory() as copy:
        folder = Path(download_artifacts(logged.artifact_location, dst_path=copy, tracking_uri=tracking_uri(project)))
        data = next(folder.rglob(TRAINED)).parent
        return _loaded(
            data / TRAINED,
            data / TOKENIZER,
            _facts(run.params, run.metrics.get("bits_per_byte/test"), f"models:/{identity}"),
            {"weights": tags.get(WEIGHTS_DIGEST), "settings": _settings(run.params), "tokenizer": tags[DIGEST].partition(" ")[2]},
            {"weights": sha256(data / TRAINED / "model.safetensors")},
            {name: [run.tags[f"sha256.{name}"]] for name in ("data", "code")},
            _now(project, Instance(stage("pretrain"), run.tags["model"], int(run.tags["seed"]))),
        )


def _loaded(
    trained: Path,
    tokenizer: Path,
    facts: dict[str, Any],
    recorded: dict[str, str | None],
    found: dict[str, str],
    made_by: dict[str, list[str]],
    now: dict[str, str | None],
) -> Loaded:
    """Load it and compare `recorded` digests with those `found`; `made_by` are those of what the training read, `now` today's."""
    from stacklm.data.tokenizer import Tokenizer
    from stacklm.model.store import StoreError, load_model

    words = Tokenizer.load(tokenizer)
    model, config = load_model(trained, words.digest)
    settings = {"architecture": plain(config.architecture), "train": {"context_length": config.context_length}}
    found = {**found, "tokenizer": words.digest, "settings": _settings(as_params(settings))}
    if wrong := [name for name, value in recorded.items() if value not in (None, found[name])]:
        raise StoreError(f"{facts['path']}: {listed(wrong)} not as recorded; bring back what was trained, or train it again")
    verdicts = {name: SAME if value else UNKNOWN for name, value in recorded.items()}
    for name, digests in made_by.items():
        there = now[name]
        same = there is not None and any(there.startswith(one) for one in digests)
        verdicts[name] = UNKNOWN if there is None else SAME if same else CHANGED
    parameters = count(sum(parameter.numel() for parameter in model.parameters()))
    return Loaded(model.eval(), words, config, {"parameters": parameters, **facts}, verdicts)


def _now(project: Project, item: Instance) -> dict[str, str | None]:
    """The digests of the tokens and of the code that a training would read now; None where there are none."""
    manifest, params = project.root / stage("pretrain").reads["shards"] / "manifest.json", load_params(project.params_file)
    return {
        "data": sha256(manifest) if manifest.exists() else None,
        "code": digest(joined(code_files(project, item, params))) if item.model in params.models else None,
    }


def _settings(params: Mapping[str, Any]) -> str:
    """A digest of what made the model, of settings as MLflow has them."""
    return digest({key: str(value) for key, value in params.items() if key.startswith(("architecture.", "train.context_length"))})


def _facts(params: Mapping[str, Any], bits: float | None, path: str) -> dict[str, Any]:
    """Of a training, by its settings as MLflow has them."""
    tokens = math.prod(int(params[f"train.{key}"]) for key in ("max_steps", "global_batch_size", "context_length"))
    source = params.get("data.source.name") or params.get("data.source.kind")
    return {"trained on": f"{count(tokens)} tokens of {source}", "bits per byte, test": bits, "path": path}


def _tokenizer(project: Project) -> Path:
    return project.root / stage("tokenizer").writes["tokenizer"]
