"""The better model of the last comparison is found by an alias."""

from __future__ import annotations

from mlflow.exceptions import MlflowException

from stacklm.pipeline.tracking.store import tracking_uri
from stacklm.pipeline.tracking.sync import sync_all
from support.tracking_project import client, publish_evaluation, publish_model, publish_report


def champion(project) -> str | None:
    try:
        return client(project).get_model_version_by_alias("stacklm", "champion").tags["model"]
    except MlflowException:
        return None


def versions(project) -> list[str]:
    return sorted(version.tags["model"] for version in client(project).search_model_versions("name = 'stacklm'"))


def test_the_alias_follows_the_last_comparison_and_loads(project, monkeypatch):
    import mlflow

    for model in ("stacked", "dense"):
        publish_model(project, model)
        publish_evaluation(project, model)
    assert sync_all(project) and versions(project) == []  # nothing was compared yet

    publish_report(project, "stacked", "dense", best="dense")
    assert sync_all(project)
    assert (champion(project), versions(project)) == ("dense", ["dense", "stacked"])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri(project))
    (text,) = mlflow.pyfunc.load_model("models:/stacklm@champion").predict(["def "], params={"tokens": 4})
    assert isinstance(text, str)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")

    publish_report(project, "stacked", "dense", best="stacked")
    assert sync_all(project)
    assert (champion(project), versions(project)) == ("stacked", ["dense", "stacked"])
    publish_report(project, "stacked", "dense")
    assert sync_all(project)
    assert (champion(project), versions(project)) == (None, ["dense", "stacked"])
