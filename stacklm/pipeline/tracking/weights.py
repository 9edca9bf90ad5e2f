"""A trained model as MLflow keeps it: the safetensors and settings of training, with a signature.

Loading reads numbers and settings and never unpickles: `mlflow.pyfunc.load_model(uri).predict(ids)` takes token ids
int64 `[B, T]` and gives logits float32 `[B, T, V]`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stacklm.files import read_json, sha256
from stacklm.pipeline.tracking.notes import weights_note

if TYPE_CHECKING:
    import numpy as np
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel
    from mlflow.models import Model

FLAVOR = "stacklm"
FILES = ("model.safetensors", "config.json")
LARGEST_COPY = 500_000_000
"""Bytes. A larger model is linked: MLflow shows it, and its weights stay where training put them."""


def log_weights(client: MlflowClient, experiment: str, run: str, trained: Path, facts: Mapping[str, Any]) -> str:
    """Log the model in folder `trained` as an output of a run, if that very model is not there yet; return its id.

    `facts` are the run's. What an interrupted attempt left is removed.
    """
    from mlflow.entities import LoggedModelOutput, LoggedModelStatus

    digest = sha256(trained / FILES[0])
    for model in client.search_logged_models([experiment], filter_string=f"source_run_id = '{run}'"):
        if model.status == LoggedModelStatus.READY and model.tags.get("stacklm.sha256") == digest:
            return model.model_id
        client.delete_logged_model(model.model_id)
    size = sum((trained / file).stat().st_size for file in FILES)
    tags = {"stacklm.sha256": digest}
    if size > LARGEST_COPY:
        tags.update({"stacklm.link": (trained / FILES[0]).as_uri(), "mlflow.model.isExternal": "true"})
    params = {key: str(value) for key, value in facts["params"].items()}
    model = client.create_logged_model(experiment, facts["model"], run, tags, params, model_type=params["architecture.kind"])
    client.set_logged_model_tags(model.model_id, {"mlflow.note.content": weights_note(model.model_id)})
    with tempfile.TemporaryDirectory() as folder:
        description = Path(folder) / "MLmodel"
        _describe(trained, model, run, size).save(description)
        client.log_model_artifact(model.model_id, str(description))
    if size <= LARGEST_COPY:
        for file in FILES:
            client.log_model_artifact(model.model_id, str(trained / file), FLAVOR)
    client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
    client.log_outputs(run, [LoggedModelOutput(model.model_id, facts["steps"])])
    return model.model_id


def _describe(trained: Path, logged: LoggedModel, run: str, size: int) -> Model:
    """The MLmodel file: how to load it, and what goes in and out."""
    import numpy as np
    from mlflow.models import Model, ModelSignature
    from mlflow.types import Schema, TensorSpec

    vocab_size = read_json(trained / FILES[1])["vocab_size"]
    signature = ModelSignature(
        inputs=Schema([TensorSpec(np.dtype("int64"), (-1, -1))]),
        outputs=Schema([TensorSpec(np.dtype("float32"), (-1, -1, vocab_size))]),
    )
    model = Model(
        artifact_path=logged.artifact_location,
        run_id=run,
        model_uuid=logged.model_id,
        model_id=logged.model_id,
        signature=signature,
        model_size_bytes=size,
    )
    model.add_flavor(FLAVOR, data=FLAVOR, format="safetensors")
    return model.add_flavor("python_function", loader_module=__name__, data=FLAVOR)


class _Scorer:
    """The model behind MLflow's `predict`."""

    def __init__(self, folder: Path) -> None:
        from stacklm.model.store import load_model

        self._model = load_model(folder)[0].eval()

    def predict(self, ids_BT: np.ndarray, params: dict | None = None) -> np.ndarray:
        import torch

        with torch.no_grad():
            return self._model(torch.as_tensor(ids_BT)).float().numpy()


def _load_pyfunc(path: str) -> _Scorer:
    """What MLflow calls with the folder of `FILES`."""
    return _Scorer(Path(path))
