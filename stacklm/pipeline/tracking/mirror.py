"""One run in MLflow, brought up to date with its files: only what it lacks is logged, so any step may be repeated."""

from __future__ import annotations

import hashlib
import json
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from stacklm.files import read_jsonl, sha256, write_json
from stacklm.pipeline.project import Project
from stacklm.pipeline.stages import stage
from stacklm.pipeline.tracking import pages
from stacklm.pipeline.tracking.run import FINGERPRINT, Point, Pretraining, points, user
from stacklm.pipeline.tracking.store import WAIT, connect
from stacklm.pipeline.tracking.weights import log_weights

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel

DIGITS = 12
"""Hexadecimal digits shown of a hash."""
IDENTITY = "stacklm.pipeline_run"
PARENT = "mlflow.parentRunId"
WORST_FIRST = ("RUNNING", "FAILED", "KILLED", "FINISHED")
NOTE = "mlflow.note.content"
CONTEXTS = {"train": "training", "valid": "validation", "test": "test"}
"""What each split is used for, in MLflow's words."""
SCORES = {"valid": "valid_whole", "test": "test"}
"""The names of an evaluation's splits: `valid` alone is the part that is scored while training."""
TEST = f"bits_per_byte/{SCORES['test']}"


class Mirror:
    """Finds the run by its fingerprint, or creates it, and learns what it has.

    Every method raises whatever MLflow raises where it cannot be reached.
    """

    def __init__(self, run: Pretraining) -> None:
        self._run, self._facts = run, run.facts()
        self._client, self._experiment = connect(run.project)
        found = self._client.search_runs([self._experiment], f"tags.`{FINGERPRINT}` = '{run.fingerprint}'", max_results=1)
        there = found[0] if found else self._create()
        self._id, self._status, self._metrics = there.info.run_id, there.info.status, there.data.metrics
        self._tags = dict(there.data.tags)
        write_json(run.note("ids"), {"experiment": self._experiment, "run": self._id})
        self._steps: dict[str, set[int]] = defaultdict(set)
        for key in there.data.metrics:
            self._steps[key] = {metric.step for metric in self._client.get_metric_history(self._id, key)}
        if not found:
            self._set_status(self._status)
        self._describe(there)

    def grow(self) -> None:
        """Draw what the curves lack so far; the run is running."""
        if self._status != "RUNNING":
            self._client.update_run(self._id, status="RUNNING")
            self._set_status("RUNNING")
        self._draw(points(read_jsonl(self._run.metrics), self._run.times(), self._facts["steps"]))

    def end(self, status: str) -> None:
        """Draw the rest and close the run as FINISHED, FAILED or KILLED; its duration is the time spent training."""
        self.grow()
        timing = self._run.times()
        self._client.set_terminated(self._id, status, self._time(timing[-1]["seconds"] if timing else 0))
        self._set_status(status)

    def finish(self) -> None:
        """Add what a published run has besides its curves: weights, scores, report."""
        run, facts = self._run, self._facts
        if self._status != "FINISHED":
            self.end("FINISHED")
        model = log_weights(self._client, self._experiment, self._id, run.trained, self._tokenizer(), facts)
        self._draw([Point("model/bytes", 0, (run.trained / "model.safetensors").stat().st_size, 0)])
        evaluation = run.evaluation()
        if evaluation is not None:
            self._score(evaluation, model)
            if PARENT in self._tags:
                score_parent(self._client, self._experiment, self._tags[PARENT], facts["model"])
            if self._attach("evaluation", run.evaluation_file) or self._tags.get(NOTE) == pages.run_note(facts, None):
                self._client.set_tag(self._id, NOTE, pages.run_note(facts, evaluation))
        for name, folder in run.reports().items():
            self._attach(name, folder)

    def _create(self) -> Any:
        name, pipeline, parent = pages.run_name(self._facts), self._facts.get("pipeline"), {}
        if pipeline:
            parent[PARENT] = find_or_create_parent(self._client, self._experiment, self._run.project, pipeline)
        same = self._client.search_runs(
            [self._experiment], f"tags.model = '{self._facts['model']}' and tags.seed = '{self._facts['seed']}'"
        )
        return self._client.create_run(
            self._experiment,
            start_time=self._time(0),
            run_name=f"{name} · run {len(same) + 1}" if same else name,
            tags={FINGERPRINT: self._run.fingerprint, NOTE: pages.run_note(self._facts, None), **_tags(self._facts), **parent},
        )

    def _set_status(self, status: str) -> None:
        self._status = status
        if PARENT in self._tags:
            settle_parent(self._client, self._experiment, self._tags[PARENT])

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
        used = {tag.value for used in (there.inputs.dataset_inputs if there.inputs else []) for tag in used.tags}
        contexts = {split: context for split, context in CONTEXTS.items() if context not in used}
        inputs = [
            DatasetInput(dataset(facts["data"], split), [InputTag("mlflow.data.context", context)])
            for split, context in contexts.items()
        ]
        if inputs:
            self._client.log_inputs(self._id, inputs)
        tokenizer = self._tokenizer()
        if tokenizer:
            self._attach("tokenizer", tokenizer)

    def _tokenizer(self) -> Path | None:
        """The published tokenizer, if it is the one whose tokens the model was trained on."""
        path = self._run.project.root / stage("tokenizer").writes["tokenizer"]
        return path if path.exists() and sha256(path) == self._facts["data"]["tokenizer"] else None

    def _draw(self, wanted: Sequence[Point]) -> None:
        from mlflow.entities import Metric

        missing = [point for point in wanted if point.step not in self._steps[point.key]]
        for batch in _batches(missing, 1000):
            self._client.log_batch(self._id, [Metric(p.key, p.value, self._time(p.seconds), p.step) for p in batch])
            for point in batch:
                self._steps[point.key].add(point.step)

    def _score(self, evaluation: Mapping[str, Any], model: LoggedModel) -> None:
        """Scores belong to the run, the model and the data; a later evaluation of the same weights replaces them.

        Single values are at step 0, where MLflow draws bars and not a point.
        """
        from mlflow.entities import Metric

        now, logged = round(time.time() * 1000), {metric.key: metric.value for metric in model.metrics or []}
        for split, name in SCORES.items():
            data = dataset(self._facts["data"], split)
            of = {"model_id": model.model_id, "dataset_name": data.name, "dataset_digest": data.digest}
            scores = {f"{key}/{name}": evaluation[split][key] for key in ("bits_per_byte", "loss", "word_perplexity")}
            known = {key: value for key, value in logged.items() if self._metrics.get(key) == value}
            new = [Metric(key, value, now, 0, **of) for key, value in scores.items() if known.get(key) != value]
            if new:
                self._client.log_batch(self._id, new)
        scores = {
            f"benchmarks/{title}/{name}": score["value"]
            for title, figures in evaluation.get("benchmarks", {}).items()
            for name, score in figures["scores"].items()
        }
        new = [Metric(key, value, now, 0) for key, value in scores.items() if self._metrics.get(key) != value]
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
        "seed": str(facts["seed"]),
        "kind": facts["params"]["architecture.kind"],
        **{f"sha256.{name}": digest[:DIGITS] for name, digest in digests.items()},
        **{f"version.{name}": version for name, version in facts["versions"].items()},
        **({"git.dirty": git["dirty"]} if git else {}),
        **{f"mlflow.source.git.{name}": value for name, value in git.items()},
        "mlflow.user": user(),
        **(facts.get("pipeline") or {}).get("tags", {}),
        "mlflow.source.name": f"stacklm stage pretrain {facts['model']} {facts['seed']}",
        "mlflow.source.type": "LOCAL",
    }


def dataset(data: Mapping[str, Any], split: str) -> Any:
    """One split of the tokens in MLflow's form; `data` as from `data_facts`."""
    from mlflow.entities import Dataset

    return Dataset(
        name=f"{data['name']}-{split}",
        digest=hashlib.sha256(f"{data['sha256']} {split}".encode()).hexdigest()[:DIGITS],
        source_type=data["source"]["kind"],
        source=json.dumps(data["source"]),
        schema=json.dumps({"mlflow_colspec": [{"name": "token id", "type": data["dtype"], "required": True}]}),
        profile=json.dumps(data["splits"][split]),
    )


def _batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[i : i + size] for i in range(0, len(items), size))


def find_or_create_parent(client: MlflowClient, experiment: str, project: Project, run: Mapping[str, Any]) -> str:
    """The id of the parent run of `run`, as told by `pipeline_run`; models that train at once share it."""
    with FileLock(project.state / "tracking" / f"{run['identity'][:16]}.lock", timeout=WAIT):
        found = client.search_runs([experiment], f"tags.`{IDENTITY}` = '{run['identity']}'", max_results=1)
        if found:
            return found[0].info.run_id
        tags = {
            IDENTITY: run["identity"],
            "mlflow.user": user(),
            "mlflow.source.name": run["command"],
            "mlflow.source.type": "LOCAL",
        }
        created = client.create_run(experiment, round(run["started"] * 1000), {**tags, **run["tags"]}, run["name"])
        return created.info.run_id


def settle_parent(client: MlflowClient, experiment: str, parent: str) -> None:
    """Give the parent the worst status of its children and, once none is running, the end of the last one.

    A parent that the user has deleted is left alone.
    """
    if _find(client, experiment, parent) is None:
        return
    children = [child.info for child in client.search_runs([experiment], f"tags.`{PARENT}` = '{parent}'")]
    status = min((child.status for child in children), key=WORST_FIRST.index)
    if status == "RUNNING":
        client.update_run(parent, status=status)
    else:
        client.set_terminated(parent, status, max(child.end_time or 0 for child in children))


def score_parent(client: MlflowClient, experiment: str, parent: str, model: str) -> None:
    """Show on the parent too how good a model is, as the mean over its seeds so far: MLflow's own pages begin with parents."""
    children = client.search_runs([experiment], f"tags.`{PARENT}` = '{parent}' and tags.model = '{model}'")
    scores = [child.data.metrics[TEST] for child in children if TEST in child.data.metrics]
    found, key = _find(client, experiment, parent), f"bits_per_byte_test/{model}"
    if found is not None and scores and found.data.metrics.get(key) != fmean(scores):
        client.log_metric(parent, key, fmean(scores))


def _find(client: MlflowClient, experiment: str, run: str) -> Any:
    """The run, or None where the user has deleted it."""
    return next(iter(client.search_runs([experiment], f"attributes.run_id = '{run}'")), None)
