"""Trained models in MLflow: logged as safetensors, settings and tokenizer, for text generation; and the registered model.

`mlflow.pyfunc.load_model(uri)` reads weights and settings, never unpickles and executes no code from the files; it needs
this package. `.predict(["def "])` returns a continuation of each prompt, `.get_raw_model()` the torch module: ids int64
`[B, T]` to logits float32 `[B, T, V]`.
"""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stacklm.config.evaluate import Sample
from stacklm.config.schema import plain, read
from stacklm.files import sha256
from stacklm.pipeline.project import Project
from stacklm.pipeline.tracking.pages import weights_note
from stacklm.pipeline.tracking.run import FINGERPRINT, Pretraining
from stacklm.pipeline.tracking.store import connect, experiment_name

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel
    from torch import nn

WEIGHTS = "model.safetensors"
TRAINED, TOKENIZER = "model", "tokenizer"
"""Folders in a logged model's data."""
REQUIREMENTS = ("torch", "numpy", "safetensors", "tokenizers", "tiktoken", "pyarrow", "ruamel.yaml", "tqdm")
"""Packages that loading imports, besides this one and MLflow."""
LARGEST_COPY = 500_000_000
"""Bytes. The weights of a larger model are not copied but linked: they stay where training wrote them."""
DIGEST, LICENCE = "stacklm.sha256", "license"
CHAMPION = "champion"
WEIGHTS_DIGEST = "sha256.weights"
"""Tag with the hash against which the weights of a logged model are checked on loading."""
LONGEST = 5000
"""Maximum length of a description in MLflow's databases, in characters."""
MODEL_ID = "stacklm.model_id"
"""Tag of a version with the id of its logged model, which MLflow's own database does not store."""


def log_weights(
    client: MlflowClient, experiment: str, run: str, trained: Path, tokenizer: Path | None, facts: Mapping[str, Any]
) -> LoggedModel:
    """Log the model in folder `trained` as an output of a run, unless exactly this model is logged already, and return it.

    `facts` is the run's metadata. Without its tokenizer a model is logged, but cannot predict text. Leftovers of an interrupted
    attempt are removed.
    """
    from mlflow.entities import LoggedModelOutput, LoggedModelStatus

    digest = " ".join(sha256(path) for path in (trained, tokenizer) if path)
    for model in client.search_logged_models([experiment], filter_string=f"source_run_id = '{run}'"):
        if model.status == LoggedModelStatus.READY and model.tags.get(DIGEST) == digest:
            return model
        client.delete_logged_model(model.model_id)
    tags = {DIGEST: digest, WEIGHTS_DIGEST: sha256(trained / WEIGHTS)}
    link = (trained / WEIGHTS).stat().st_size > LARGEST_COPY
    if link:
        tags.update({"stacklm.link": (trained / WEIGHTS).as_uri(), "mlflow.model.isExternal": "true"})
    params = {key: str(value) for key, value in facts["params"].items()}
    model = client.create_logged_model(experiment, facts["model"], run, tags, params, model_type=params["architecture.kind"])
    client.set_logged_model_tags(model.model_id, {"mlflow.note.content": weights_note(model.model_id)})
    with tempfile.TemporaryDirectory() as folder:
        data, saved = Path(folder) / "data", Path(folder) / "saved"
        shutil.copytree(trained, data / TRAINED, ignore=shutil.ignore_patterns("*.jsonl", *([WEIGHTS] if link else [])))
        if tokenizer:
            shutil.copytree(tokenizer, data / TOKENIZER)
        _save(saved, data, model, run)
        client.log_model_artifacts(model.model_id, str(saved))
    client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
    client.log_outputs(run, [LoggedModelOutput(model.model_id, facts["steps"])])
    return client.get_logged_model(model.model_id)


def register(project: Project, comparison: Mapping[str, Any]) -> None:
    """Register each model of a comparison, with the weights of its first seed, and move the alias to the best one.

    If no model is known to be the best, no version has the alias. Raises whatever MLflow raises.
    """
    runs = {(run.item.model, run.item.seed): run for run in Pretraining.finished(project)}
    if not any(run.reports() for run in runs.values()):
        return  # the compared models are not the published ones
    client, experiment = connect(project)
    seed = comparison["provenance"]["seeds"][0]
    versions = {model: _version(client, experiment, runs[model, seed]) for model in comparison["models"]}
    name = registered_name()
    best, champion = comparison["best"], client.get_registered_model(name).aliases.get(CHAMPION)
    if best and versions[best] != champion:
        client.set_registered_model_alias(name, CHAMPION, versions[best])
    elif not best and champion:
        client.delete_registered_model_alias(name, CHAMPION)


def register_as(run: Pretraining, alias: str, licence: str | None = None) -> str:
    """Register one published model that is in MLflow, move the alias to it and return its URI, `models:/NAME@ALIAS`."""
    client, experiment = connect(run.project)
    client.set_registered_model_alias(registered_name(), alias, _version(client, experiment, run, licence))
    return f"models:/{registered_name()}@{alias}"


def registered_name() -> str:
    """Return the name of the registered model: the experiment's, without characters that are special in URIs."""
    return re.sub(r"[/:]+", "-", experiment_name()).strip("-")


def _version(client: MlflowClient, experiment: str, run: Pretraining, licence: str | None = None) -> str:
    """Return the version of a model, registering it if needed, and update its description to the current model card."""
    name = registered_name()
    (found,) = client.search_runs([experiment], f"tags.`{FINGERPRINT}` = '{run.fingerprint}'", max_results=1)
    logged = client.search_logged_models([experiment], filter_string=f"source_run_id = '{found.info.run_id}'")[0]
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name, description="Language models, registered after each comparison.")
    known = {one.tags.get(MODEL_ID): one for one in client.search_model_versions(f"name = '{name}'")}
    version = known.get(logged.model_id) or client.create_model_version(
        name,
        logged.artifact_location,
        run_id=logged.source_run_id,
        tags={"model": logged.name, MODEL_ID: logged.model_id},
        model_id=logged.model_id,
    )
    if licence:
        client.set_model_version_tag(name, version.version, LICENCE, licence)
    card = run.card(licence or version.tags.get(LICENCE))  # a later comparison keeps the licence
    shown = card.partition("\n---\n")[2].strip()[:LONGEST]
    if version.description != shown:
        client.log_text(str(logged.source_run_id), card, "model-card.md")
        client.update_model_version(name, version.version, shown)
    return version.version


def _save(folder: Path, data: Path, logged: LoggedModel, run: str) -> None:
    """Write the model in MLflow's format: text to text, with the sampling settings as parameters."""
    import mlflow
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

    text, kinds = Schema([ColSpec(DataType.string)]), {int: DataType.long, float: DataType.double}
    settings = {name: value for name, value in plain(Sample()).items() if name != "prompt"}
    params = ParamSchema([ParamSpec(name, kinds[type(value)], value) for name, value in settings.items()])
    mlflow.pyfunc.save_model(
        folder,
        loader_module=__name__,
        data_path=data,
        mlflow_model=Model(logged.artifact_location, run, model_uuid=logged.model_id, model_id=logged.model_id),
        signature=ModelSignature(text, text, params),
        input_example=[Sample().prompt],
        pip_requirements=[f"{name}=={importlib.metadata.version(name)}" for name in REQUIREMENTS],
    )


class _Writer:
    """The model that MLflow's `predict` calls, on the CPU."""

    def __init__(self, path: str) -> None:
        from stacklm.data.tokenizer import Tokenizer
        from stacklm.model.store import load_model

        self._words = Tokenizer.load(Path(path, TOKENIZER))
        model, config = load_model(Path(path, TRAINED), self._words.digest)
        self._model, self._context = model.eval(), config.context_length

    def predict(self, prompts: Any, params: dict[str, Any] | None = None) -> list[str]:
        """Return a continuation of each prompt; `prompts` is a one-column frame or a list, `params` are settings of `Sample`."""
        from stacklm.evaluate.generate import stream
        from stacklm.model.cache import Decoder

        decoder = Decoder(self._model, self._context)  # one per request: a server handles several at once
        sample = read(Sample, plain(Sample()) | (params or {}), "params")
        texts = prompts.iloc[:, 0] if hasattr(prompts, "iloc") else prompts
        return ["".join(stream(decoder, self._words, text, sample)) for text in texts]

    def get_raw_model(self) -> nn.Module:
        return self._model


_load_pyfunc = _Writer
"""MLflow calls this with the folder of a model's data."""
