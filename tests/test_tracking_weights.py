import numpy as np
import torch
import yaml
from tracking_project import client, runs

from stacklm.model.store import load_model
from stacklm.pipeline.tracking.sync import sync_all
from stacklm.pipeline.tracking.tracker import tracking_uri

pytest_plugins = "tracking_fixtures"


def test_mlflow_loads_it_and_gets_the_logits_of_the_model(published, monkeypatch):
    import mlflow

    sync_all(published)
    (run,) = runs(published)
    (model,) = client(published).search_logged_models([run.info.experiment_id])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri(published))
    loaded = mlflow.pyfunc.load_model(f"models:/{model.model_id}")
    ids_BT = np.array([[1, 2, 3, 4], [5, 6, 7, 8]], dtype=np.int64)
    logits_BTV = loaded.predict(ids_BT)
    original = load_model(published.root / "out/models/stacked")[0].eval()
    assert logits_BTV.dtype == np.float32
    np.testing.assert_array_equal(logits_BTV, original(torch.from_numpy(ids_BT)).detach().numpy())
    (ids,), (logits,) = loaded.metadata.signature.inputs.inputs, loaded.metadata.signature.outputs.inputs
    assert (ids.type, ids.shape, logits.type, logits.shape) == (np.int64, (-1, -1), np.float32, (-1, -1, 32))


def test_nothing_in_it_can_be_executed(published):
    sync_all(published)
    (folder,) = (published.state / "mlartifacts" / "models").iterdir()
    files = {path.name for path in folder.rglob("*") if path.is_file()}
    assert files == {"MLmodel", "model.safetensors", "config.json"}
    described = yaml.safe_load(next(folder.rglob("MLmodel")).read_text())
    assert described["flavors"]["python_function"]["loader_module"] == "stacklm.pipeline.tracking.weights"
