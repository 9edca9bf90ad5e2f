"""The better model of the last comparison is found by an alias."""

from __future__ import annotations

import pytest
from mlflow.exceptions import MlflowException

from stacklm.pipeline.tracking.store import tracking_uri
from stacklm.pipeline.tracking.sync import sync_all
from stacklm.pipeline.tracking.weights import better
from support.tracking_project import client, publish_evaluation, publish_model, publish_report


def compared(**losses: float) -> dict:
    return {"models": {name: {"test": {"loss": loss, "bits_per_byte": loss / 2}} for name, loss in losses.items()}}


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ({"a": 1.5, "b": 1.4, "c": 1.6}, "b"),
        ({"a": 1.4, "b": 1.404, "c": 2.0}, None),  # not told apart
        ({"a": 1.5}, None),
    ],
)
def test_the_better_one_is_what_the_comparison_tells_apart(losses, expected):
    assert better(compared(**losses)) == expected


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

    publish_report(project, stacked=1.5, dense=1.4)
    assert sync_all(project)
    assert (champion(project), versions(project)) == ("dense", ["dense", "stacked"])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri(project))
    (text,) = mlflow.pyfunc.load_model("models:/stacklm@champion").predict(["def "], params={"tokens": 4})
    assert isinstance(text, str)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")

    publish_report(project, stacked=1.3, dense=1.4)
    assert sync_all(project)
    assert (champion(project), versions(project)) == ("stacked", ["dense", "stacked"])
    publish_report(project, stacked=1.4, dense=1.401)
    assert sync_all(project)
    assert (champion(project), versions(project)) == (None, ["dense", "stacked"])
