"""One run in MLflow, brought up to date with its files: only what it lacks is logged, so any step may be repeated."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from stacklm.files import read_jsonl, sha256
from stacklm.pipeline.stages import stage
from stacklm.pipeline.tracking import notes
from stacklm.pipeline.tracking.curves import Point, points
from stacklm.pipeline.tracking.run import Run
from stacklm.pipeline.tracking.tracker import connect
from stacklm.pipeline.tracking.weights import log_weights

FINGERPRINT = "stacklm.fingerprint"
DIGITS = 12
"""Hexadecimal digits shown of a hash."""
NOTE = "mlflow.note.content"
SCORES = {"valid": "valid_whole", "test": "test"}
"""The names of an evaluation's splits: `valid` alone is the part that is scored while training."""


class Mirror:
    """Finds the run by its fingerprint, or creates it, and learns what it has.

    Every method raises whatever MLflow raises where it cannot be reached.
    """

    def __init__(self, run: Run) -> None:
        self._run, self._facts = run, run.facts()
        self._client, self._experiment = connect(run.project)
        found = self._client.search_runs([self._experiment], f"tags.`{FINGERPRINT}` = '{run.fingerprint}'", max_results=1)
        there = found[0] if found else self._create()
        self._id, self._status, self._metrics = there.info.run_id, there.info.status, there.data.metrics
        self._tags = dict(there.data.tags)
        self._steps: dict[str, set[int]] = defaultdict(set)
        for key in there.data.metrics:
            self._steps[key] = {metric.step for metric in self._client.get_metric_history(self._id, key)}
        self._describe(there)

    def grow(self) -> None:
        """Draw what the curves lack so far; the run is running."""
        if self._status != "RUNNING":
            self._client.update_run(self._id, status="RUNNING")
            self._status = "RUNNING"
        self._draw(points(read_jsonl(self._run.metrics), read_jsonl(self._run.timing), self._facts["steps"]))

    def end(self, status: str) -> None:
        """Draw the rest and close the run as FINISHED, FAILED or KILLED; its duration is the time spent training."""
        self.grow()
        timing = read_jsonl(self._run.timing)
        self._client.set_terminated(self._id, status, self._time(timing[-1]["seconds"] if timing else 0))
        self._status = status

    def finish(self) -> None:
        """Add what a published run has besides its curves: weights, scores, report."""
        run, facts = self._run, self._facts
        if self._status != "FINISHED":
            self.end("FINISHED")
        model = log_weights(self._client, self._experiment, self._id, run.trained, facts)
        self._draw([Point("model/bytes", 0, (run.trained / "model.safetensors").stat().st_size, 0)])
        evaluation = run.evaluation()
        if evaluation is not None:
            self._score(evaluation, model)
            path = run.project.root / stage("evaluate").writes["evaluation"].format(model=run.model)
            if self._attach("evaluation", path) or self._tags.get(NOTE) == notes.run_note(facts, None):
                self._client.set_tag(self._id, NOTE, notes.run_note(facts, evaluation))
        report = run.report()
        if report is not None:
            self._attach("report", report)

    def _create(self) -> Any:
        name = notes.run_name(self._facts)
        same = self._client.search_runs([self._experiment], f"tags.model = '{self._run.model}'")
        return self._client.create_run(
            self._experiment,
            start_time=self._time(0),
            run_name=f"{name} · run {len(same) + 1}" if same else name,
            tags={FINGERPRINT: self._run.fingerprint, NOTE: notes.run_note(self._facts, None), **_tags(self._facts)},
        )

    def _describe(self, there: Any) -> None:
        """What holds from the first step on: settings, size, data, tokenizer."""
        from mlflow.entities import DatasetInput, InputTag, Param

        facts = self._facts
        params = [Param(key, str(value)) for key, value in facts["params"].items() if key not in there.data.params]
        if params:
            self._client.log_dict(self._id, facts["params"], "params.yaml")
        for batch in _batches(params, 100):
            self._client.log_batch(self._id, params=batch)
        self._draw([Point(key, 0, value, 0) for key, value in facts["size"].items()])
        if not there.inputs or not there.inputs.dataset_inputs:
            context = InputTag("mlflow.data.context", "training")
            self._client.log_inputs(self._id, [DatasetInput(_dataset(facts["data"]), [context])])
        tokenizer = self._run.project.root / stage("tokenizer").writes["tokenizer"]
        if tokenizer.exists() and sha256(tokenizer) == facts["data"]["tokenizer"]:
            self._attach("tokenizer", tokenizer)

    def _draw(self, wanted: Sequence[Point]) -> None:
        from mlflow.entities import Metric

        missing = [point for point in wanted if point.step not in self._steps[point.key]]
        for batch in _batches(missing, 1000):
            self._client.log_batch(self._id, [Metric(p.key, p.value, self._time(p.seconds), p.step) for p in batch])
            for point in batch:
                self._steps[point.key].add(point.step)

    def _score(self, evaluation: Mapping[str, Any], model: str) -> None:
        """Scores belong to the run, the model and the data; a later evaluation of the same weights replaces them.

        Single values are at step 0, where MLflow draws bars and not a point.
        """
        from mlflow.entities import Metric

        of = {"model_id": model, "dataset_name": self._facts["data"]["name"], "dataset_digest": _digest(self._facts["data"])}
        scores = {
            f"{key}/{name}": evaluation[split][key]
            for split, name in SCORES.items()
            for key in ("bits_per_byte", "loss", "word_perplexity")
        }
        now = round(time.time() * 1000)
        new = [Metric(key, value, now, 0, **of) for key, value in scores.items() if self._metrics.get(key) != value]
        if new:
            self._client.log_batch(self._id, new)

    def _attach(self, name: str, path: Path) -> bool:
        """Upload a folder as artifact `name`, or a file into it, unless that very content is there; tell whether it was new."""
        digest, tag = sha256(path)[:DIGITS], f"sha256.{name}"
        if self._tags.get(tag) == digest:
            return False
        upload = self._client.log_artifacts if path.is_dir() else self._client.log_artifact
        upload(self._id, str(path), name)
        self._client.set_tag(self._id, tag, digest)
        return True

    def _time(self, seconds: float) -> int:
        """MLflow's milliseconds: the start of the run and the training time since, so that pauses do not show."""
        return round((self._facts["started"] + seconds) * 1000)


def _tags(facts: Mapping[str, Any]) -> dict[str, str]:
    digests = {"code": facts["code"], "data": facts["data"]["sha256"]}
    git = {name: str(value).lower() if isinstance(value, bool) else value for name, value in facts.get("git", {}).items()}
    return {
        "model": facts["model"],
        "kind": facts["params"]["architecture.kind"],
        **{f"sha256.{name}": digest[:DIGITS] for name, digest in digests.items()},
        **{f"version.{name}": version for name, version in facts["versions"].items()},
        **({"git.dirty": git["dirty"]} if git else {}),
        **{f"mlflow.source.git.{name}": value for name, value in git.items()},
        "mlflow.source.name": f"stacklm stage pretrain {facts['model']}",
        "mlflow.source.type": "LOCAL",
    }


def _dataset(data: Mapping[str, Any]) -> Any:
    from mlflow.entities import Dataset

    return Dataset(
        name=data["name"],
        digest=_digest(data),
        source_type=data["source"]["kind"],
        source=json.dumps(data["source"]),
        schema=json.dumps({"mlflow_colspec": [{"name": "token id", "type": data["dtype"], "required": True}]}),
        profile=json.dumps({f"{split} {unit}": n for split, sizes in data["splits"].items() for unit, n in sizes.items()}),
    )


def _digest(data: Mapping[str, Any]) -> str:
    return data["sha256"][:DIGITS]


def _batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[i : i + size] for i in range(0, len(items), size))
