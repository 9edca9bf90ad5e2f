"""Update one run in MLflow from its files: only what is missing is logged, so any step can be repeated."""

from __future__ import annotations

import hashlib
import json
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from stacklm.files import read_jsonl, sha256, write_json
from stacklm.pipeline.stages import stage
from stacklm.pipeline.tracking import pages
from stacklm.pipeline.tracking.run import FINGERPRINT, Point, Pretraining, points, user
from stacklm.pipeline.tracking.store import WAIT, connect
from stacklm.pipeline.tracking.weights import log_weights

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel, Run

DIGITS = 12
"""Number of hexadecimal digits of a hash that are shown."""
IDENTITY = "stacklm.pipeline_run"
PARENT = "mlflow.parentRunId"
WORST_FIRST = ("RUNNING", "FAILED", "KILLED", "FINISHED")
NOTE = "mlflow.note.content"
CONTEXTS = {"train": "training", "valid": "validation", "test": "test"}
"""The MLflow dataset context of each split."""
SCORES = {"valid": "valid_whole", "test": "test"}
"""Metric names of the splits of an evaluation; plain `valid` is the part that is scored during training."""
TEST = f"bits_per_byte/{SCORES['test']}"


class Mirror:
    """One run in MLflow, found by its fingerprint or created.

    Every method raises whatever MLflow raises if it is not reachable.
    """

    def __init__(self, run: Pretraining) -> None:
        self._run, self._facts = run, run.facts()
        self._client, self._experiment = connect(run.project)
        found = self._search(f"tags.`{FINGERPRINT}` = '{run.fingerprint}'")
        self._there: Run = found[0] if found else self._create()
        self._id, self._status, self._tags = self._there.info.run_id, self._there.info.status, self._there.data.tags
        write_json(run.note("ids"), {"experiment": self._experiment, "run": self._id})
        self._steps: dict[str, set[int]] = defaultdict(set)
        for key in self._there.data.metrics:
            self._steps[key] = {metric.step for metric in self._client.get_metric_history(self._id, key)}
        if not found:
            self._set_status(self._status)
        self._describe()

    def grow(self) -> None:
        """Log the missing points of the metrics and mark the run as RUNNING."""
        if self._status != "RUNNING":
            self._client.update_run(self._id, status="RUNNING")
            self._set_status("RUNNING")
        self._draw(points(read_jsonl(self._run.metrics), self._run.times(), self._facts["steps"]))

    def end(self, status: str) -> None:
        """Log the remaining points and end the run as FINISHED, FAILED or KILLED; its duration is the training time."""
        self.grow()
        timing = self._run.times()
        self._client.set_terminated(self._id, status, self._time(timing[-1]["seconds"] if timing else 0))
        self._set_status(status)

    def finish(self) -> None:
        """Log weights, scores and report of a published run."""
        run, facts = self._run, self._facts
        if self._status != "FINISHED":
            self.end("FINISHED")
        model = log_weights(self._client, self._experiment, self._id, run.trained, self._tokenizer(), facts)
        self._draw([Point("model/bytes", 0, (run.trained / "model.safetensors").stat().st_size, 0)])
        evaluation = run.evaluation()
        if evaluation is not None:
            self._score(evaluation, model)
            self._score_parent()
            if self._attach("evaluation", run.evaluation_file) or self._tags.get(NOTE) == pages.run_note(facts, None):
                self._client.set_tag(self._id, NOTE, pages.run_note(facts, evaluation))
        for name, folder in run.reports().items():
            self._attach(name, folder)

    def _search(self, condition: str) -> Sequence[Run]:
        return self._client.search_runs([self._experiment], condition)

    def _create(self) -> Run:
        name, pipeline = pages.run_name(self._facts), self._facts.get("pipeline")
        parent = {PARENT: self._find_or_create_parent(pipeline)} if pipeline else {}
        same = self._search(f"tags.model = '{self._facts['model']}' and tags.seed = '{self._facts['seed']}'")
        return self._client.create_run(
            self._experiment,
            start_time=self._time(0),
            run_name=f"{name} · run {len(same) + 1}" if same else name,
            tags={FINGERPRINT: self._run.fingerprint, NOTE: pages.run_note(self._facts, None), **_tags(self._facts), **parent},
        )

    def _set_status(self, status: str) -> None:
        """Store the status; set the parent to its children's worst status and, once none is running, to the last end time."""
        self._status = status
        if (parent := self._parent()) is None:
            return
        identity = parent.info.run_id
        children = [child.info for child in self._search(f"tags.`{PARENT}` = '{identity}'")]
        worst = min((child.status for child in children), key=WORST_FIRST.index)
        if worst == "RUNNING":
            self._client.update_run(identity, status=worst)
        else:
            self._client.set_terminated(identity, worst, max(child.end_time or 0 for child in children))

    def _describe(self) -> None:
        """Log what is known from the first step: settings, size, data, tokenizer."""
        from mlflow.entities import Param

        facts = self._facts
        params = [Param(key, str(value)) for key, value in facts["params"].items() if key not in self._there.data.params]
        if params:
            self._client.log_dict(self._id, facts["params"], "params.yaml")
            self._client.log_batch(self._id, params=params)
        self._draw([Point(key, 0, value, 0) for key, value in facts["size"].items()])
        log_data(self._client, self._there, datasets(facts["data"]))
        tokenizer = self._tokenizer()
        if tokenizer:
            self._attach("tokenizer", tokenizer)

    def _tokenizer(self) -> Path | None:
        """The published tokenizer, or None if the model was trained with another one."""
        path = self._run.project.root / stage("tokenizer").writes["tokenizer"]
        return path if path.exists() and sha256(path) == self._facts["data"]["tokenizer"] else None

    def _draw(self, wanted: Sequence[Point]) -> None:
        from mlflow.entities import Metric

        missing = [point for point in wanted if point.step not in self._steps[point.key]]
        self._client.log_batch(self._id, [Metric(p.key, p.value, self._time(p.seconds), p.step) for p in missing])
        for point in missing:
            self._steps[point.key].add(point.step)

    def _score(self, evaluation: Mapping[str, Any], model: LoggedModel) -> None:
        """Log scores for the run, the model and the data; a later evaluation of the same weights replaces them.

        Single values are logged at step 0, where MLflow draws bars instead of a point.
        """
        from mlflow.entities import Metric

        now, known, new = round(time.time() * 1000), self._there.data.metrics, []
        logged = {metric.key: metric.value for metric in (model.metrics or []) if known.get(metric.key) == metric.value}
        for split, name in SCORES.items():
            data = dataset(self._facts["data"], split)
            of = {"model_id": model.model_id, "dataset_name": data.name, "dataset_digest": data.digest}
            scores = {f"{key}/{name}": evaluation[split][key] for key in ("bits_per_byte", "loss", "word_perplexity")}
            new += [Metric(key, value, now, 0, **of) for key, value in scores.items() if logged.get(key) != value]
        for title, figures in evaluation.get("benchmarks", {}).items():
            scores = {f"benchmarks/{title}/{name}": score["value"] for name, score in figures["scores"].items()}
            new += [Metric(key, value, now, 0) for key, value in scores.items() if known.get(key) != value]
        self._client.log_batch(self._id, new)

    def _attach(self, name: str, path: Path) -> bool:
        return attach(self._client, self._there, name, path, name)

    def _find_or_create_parent(self, pipeline: Mapping[str, Any]) -> str:
        """Return the id of the parent run of a pipeline run (from `pipeline_run`); models that train concurrently share it."""
        with FileLock(self._run.project.state / "tracking" / f"{pipeline['identity'][:16]}.lock", timeout=WAIT):
            if found := self._search(f"tags.`{IDENTITY}` = '{pipeline['identity']}'"):
                return found[0].info.run_id
            tags = {
                IDENTITY: pipeline["identity"],
                "mlflow.user": user(),
                "mlflow.source.name": pipeline["command"],
                "mlflow.source.type": "LOCAL",
                **pipeline["tags"],
            }
            started = round(pipeline["started"] * 1000)
            return self._client.create_run(self._experiment, started, tags, pipeline["name"]).info.run_id

    def _parent(self) -> Run | None:
        """The parent run of the pipeline run; None if there is none or the user has deleted it."""
        found = self._search(f"attributes.run_id = '{self._tags[PARENT]}'") if PARENT in self._tags else []
        return found[0] if found else None

    def _score_parent(self) -> None:
        """Log the model's mean score over its seeds so far on the parent too: MLflow's own pages list parents first."""
        if (parent := self._parent()) is None:
            return
        model, identity = self._facts["model"], parent.info.run_id
        children = self._search(f"tags.`{PARENT}` = '{identity}' and tags.model = '{model}'")
        scores = [child.data.metrics[TEST] for child in children if TEST in child.data.metrics]
        key = f"bits_per_byte_test/{model}"
        if scores and parent.data.metrics.get(key) != fmean(scores):
            self._client.log_metric(identity, key, fmean(scores))

    def _time(self, seconds: float) -> int:
        """MLflow's timestamp in milliseconds: start of the run plus training time, so that pauses are excluded."""
        return round((self._facts["started"] + seconds) * 1000)


def _tags(facts: Mapping[str, Any]) -> dict[str, str]:
    git = {name: str(value).lower() if isinstance(value, bool) else value for name, value in facts.get("git", {}).items()}
    return {
        "model": facts["model"],
        "seed": str(facts["seed"]),
        "kind": facts["params"]["architecture.kind"],
        "sha256.code": facts["code"][:DIGITS],
        "sha256.data": facts["data"]["sha256"][:DIGITS],
        **{f"version.{name}": version for name, version in facts["versions"].items()},
        **({"git.dirty": git["dirty"]} if git else {}),
        **{f"mlflow.source.git.{name}": value for name, value in git.items()},
        "mlflow.user": user(),
        **(facts.get("pipeline") or {}).get("tags", {}),
        "mlflow.source.name": f"stacklm stage pretrain {facts['model']} {facts['seed']}",
        "mlflow.source.type": "LOCAL",
    }


def dataset(data: Mapping[str, Any], split: str) -> Any:
    """One split of the tokens as an MLflow dataset; `data` is from `data_facts`."""
    from mlflow.entities import Dataset

    return Dataset(
        name=f"{data['name']}-{split}",
        digest=hashlib.sha256(f"{data['sha256']} {split}".encode()).hexdigest()[:DIGITS],
        source_type=data["source"]["kind"],
        source=json.dumps(data["source"]),
        schema=json.dumps({"mlflow_colspec": [{"name": "token id", "type": data["dtype"], "required": True}]}),
        profile=json.dumps(data["splits"][split]),
    )


def datasets(data: Mapping[str, Any]) -> dict[str, Any]:
    """All splits of the tokens as MLflow datasets, by context."""
    return {context: dataset(data, split) for split, context in CONTEXTS.items()}


def log_data(client: MlflowClient, run: Run, used: Mapping[str, Any]) -> None:
    """Log those datasets of `used` (by context) that the run does not have yet."""
    from mlflow.entities import DatasetInput, InputTag

    there = {tag.value for one in (run.inputs.dataset_inputs if run.inputs else []) for tag in one.tags}
    missing = {context: data for context, data in used.items() if context not in there}
    if missing:
        inputs = [DatasetInput(data, [InputTag("mlflow.data.context", context)]) for context, data in missing.items()]
        client.log_inputs(run.info.run_id, inputs)


def attach(client: MlflowClient, run: Run, name: str, path: Path, folder: str | None) -> bool:
    """Upload a file or folder into `folder` of a run's artifacts unless its content is there already; return whether it was new.

    The tag `sha256.NAME` has the hash of the uploaded content.
    """
    digest, tag = sha256(path)[:DIGITS], f"sha256.{name}"
    if run.data.tags.get(tag) == digest:
        return False
    upload = client.log_artifacts if path.is_dir() else client.log_artifact
    upload(run.info.run_id, str(path), folder)
    client.set_tag(run.info.run_id, tag, digest)
    return True
