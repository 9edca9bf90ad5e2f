"""Experiments of the lab in MLflow, from their records: `lab/NAME` has a summary run per arm, with its trials as child runs.

A summary run has the mean difference, its interval and the margin (in percent) and the number of seeds as metrics, the verdict
in its name and as a tag, and the plot of intervals and the report as files. With several sizes, the number of parameters is the
step of these metrics. Runs are found by a tag, and only what is missing is logged.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from stacklm.files import read_json, sha256, write_json
from stacklm.pipeline.project import EXPERIMENTS, Project
from stacklm.pipeline.stages import Instance, stage
from stacklm.pipeline.tracking.mirror import CONTEXTS, DIGITS, PARENT, attach, datasets, log_data
from stacklm.pipeline.tracking.run import data_facts
from stacklm.pipeline.tracking.store import connect, matches, store_identity
from stacklm.progress import progress

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

    from stacklm.lab.findings import Findings
    from stacklm.lab.schedule import Planned

KEY = "stacklm.lab"
NOTE = """\
**{question}**

Top-level runs are the arms of the experiment `{name}`; their child runs are trials. `mean` is the relative difference from the
baseline in test bits per byte, in percent (lower is better), over `n` seeds with the same data order; `low` and `high` are its
interval; differences below `margin` are considered negligible. With several sizes, the x-axis is the number of parameters.
Every arm has the report and the plot of intervals as artifacts.
"""


@dataclass
class Wanted:
    """The desired state of one run; times in seconds since the epoch, 0 if unknown; metrics by key and step."""

    key: str
    name: str
    began: float
    ended: float
    status: str = "FINISHED"
    params: dict[str, str] = field(default_factory=dict)
    metrics: dict[tuple[str, int], float] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)


def sync_labs(project: Project, names: Collection[str] | None = None) -> None:
    """Update MLflow with those of the named experiments (default: all) whose files have changed since the last update.

    Raises whatever MLflow raises.
    """
    stale = {}
    for records in sorted((project.root / EXPERIMENTS).glob("*/records")):
        file = records.parent.with_suffix(".yaml")
        shown = [*store_identity(project), sha256(file), sha256(records)] if file.is_file() else None
        if shown and (names is None or file.stem in names) and not matches(_receipt(project, file.stem), shown):
            stale[file.stem] = shown
    for name, shown in progress(stale.items(), desc="experiments to MLflow", leave=False, disable=len(stale) < 2):
        sync_lab(project, name)
        write_json(_receipt(project, name), shown)


def _receipt(project: Project, name: str) -> Path:
    return project.state / "tracking" / f"lab-{name}.receipt"


def sync_lab(project: Project, name: str) -> None:
    """Update MLflow with one experiment. Raises whatever MLflow raises."""
    from stacklm.pipeline.lab import Files

    files = Files(project, name)
    findings = files.findings()
    page = files.write_report(findings)
    client, experiment = connect(project, f"lab/{name}", NOTE.format(question=findings.lab.experiment.question, name=name))
    known = {run.data.tags[KEY]: run for run in _all_runs(client, experiment) if KEY in run.data.tags}
    data = _data(project, findings.lab.data)
    done = [one for one in findings.lab.trials(findings.records) if one.trial.identity in findings.records]
    for arm in ["baseline", *findings.candidates]:
        own = [_trial(one, findings.records[one.trial.identity]) for one in done if one.arm.name == arm]
        if own:
            run = _bring(client, experiment, known, _summary(findings, arm, own), None)
            log_data(client, run, data)
            for path, folder in ((page.parent / "intervals.svg", None), (page, "report")):
                if path.exists():
                    attach(client, run, path.name, path, folder)
            for trial in own:
                _bring(client, experiment, known, trial, run.info.run_id)


def _summary(findings: Findings, arm: str, trials: list[Wanted]) -> Wanted:
    """The summary run of one arm, with all judged sizes."""
    several, metrics, tags = len(findings.lab.sizes) > 1, {}, {}
    for size, result in findings.results.items():
        parameters = findings.arm(arm, size).cost.parameters
        scores, verdict = result.scores[arm], result.verdicts.get(arm)
        values = {
            "bits_per_byte/test": fmean(scores),
            "sd_percent": 100 * stdev(scores) / fmean(scores),
            "n": len(result.seeds),
            "model/parameters": parameters,
            "learning_rate": result.rates[arm],
        }
        if verdict:
            ends = {"mean": verdict.mean, "low": verdict.low, "high": verdict.high, "margin": verdict.margin}
            values |= {end: 100 * value for end, value in ends.items()}
            tags |= {"verdict": verdict.outcome, f"verdict.size_{size:g}": verdict.outcome}
        metrics |= {(key, parameters if several else 0): value for key, value in values.items()}
    pending = any(one.arm.name == arm for one in findings.lab.pending(findings.records))
    return Wanted(
        key=arm,
        name=" · ".join(filter(None, [arm, tags.get("verdict")])),
        began=min((trial.began for trial in trials if trial.began), default=0.0),
        ended=max(trial.ended for trial in trials),
        status="RUNNING" if pending else "FINISHED",
        params=_settings(findings, arm),
        metrics=metrics,
        tags={**tags, "mlflow.note.content": findings.lab.experiment.question, "sha256.code": findings.lab.code[:12]},
    )


def _settings(findings: Findings, arm: str) -> dict[str, str]:
    """Every key in which any arm of the smallest size differs from the baseline, with this arm's value."""
    smallest = [one for one in findings.lab.arms if one.size == findings.lab.sizes[0]]
    baseline = {key: values[0] for one in smallest for key, values in one.changed.items()}
    own = next(one.changed for one in smallest if one.name == arm)
    return {key: str(own[key][1] if key in own else value) for key, value in sorted(baseline.items())}


def _trial(planned: Planned, record: Mapping[str, Any]) -> Wanted:
    rate, seed = planned.trial.model.optimizer.peak_lr, planned.trial.train.seed
    began = datetime.fromisoformat(record["began"]).timestamp() if "began" in record else 0.0
    values = {f"bits_per_byte/{split}": record[split]["bits_per_byte"] for split in ("valid", "test") if split in record}
    return Wanted(
        key=f"{planned.arm.name} {planned.trial.identity}",
        name=planned.name,
        began=began,
        ended=began and began + record["seconds"],
        status="FAILED" if "failed" in record else "FINISHED",
        params={"size": f"{planned.arm.size:g}", "learning_rate": f"{rate:.6g}", "seed": str(seed), "purpose": planned.purpose},
        metrics={(key, 0): value for key, value in values.items()},
        tags={"failed": record["failed"]} if "failed" in record else {"sha256.weights": record.get("weights", "")[:12]},
    )


def _bring(client: MlflowClient, experiment: str, known: Mapping[str, Run], wanted: Wanted, parent: str | None) -> Run:
    """Create the run, or log what is missing from it."""
    from mlflow.entities import Metric, Param, RunTag

    run, now = known.get(wanted.key), round(1000 * time.time())
    if run is None:
        tags = {KEY: wanted.key, **({PARENT: parent} if parent else {})}
        run = client.create_run(experiment, round(1000 * wanted.began) or now, tags, wanted.name)
    keys = {key for key, _ in wanted.metrics}.intersection(run.data.metrics)
    history = (metric for key in sorted(keys) for metric in client.get_metric_history(run.info.run_id, key))
    logged = {(metric.key, metric.step): metric.value for metric in sorted(history, key=lambda metric: metric.timestamp)}
    identity, ended = run.info.run_id, round(1000 * wanted.ended) or run.info.end_time or now
    # If a step has two values, MLflow shows the later one.
    metrics = [Metric(key, value, now, step) for (key, step), value in wanted.metrics.items() if logged.get((key, step)) != value]
    params = [Param(key, value) for key, value in wanted.params.items() if key not in run.data.params]
    tags = [RunTag(key, value) for key, value in wanted.tags.items() if run.data.tags.get(key) != value]
    client.log_batch(identity, metrics, params, tags)
    if run.info.run_name != wanted.name:
        client.update_run(identity, name=wanted.name)
    if wanted.status == "RUNNING" != run.info.status:
        client.update_run(identity, status="RUNNING")
    elif wanted.status != "RUNNING" and (run.info.status, run.info.end_time) != (wanted.status, ended):
        client.set_terminated(identity, wanted.status, ended)
    return run


def _data(project: Project, data: str) -> dict[str, Any]:
    """The tokens, described as in runs of the pipeline; only their hash if other tokens, or none, are on disk now."""
    from mlflow.entities import Dataset

    manifest = project.root / stage("shards").writes["shards"] / "manifest.json"
    record = project.root / Instance(stage("download")).record
    if record.exists() and manifest.exists() and sha256(manifest) == data:
        return datasets(data_facts(project.root, read_json(record)["params"].get("data", {})))
    digest = hashlib.sha256(data.encode()).hexdigest()[:DIGITS]
    return dict.fromkeys(CONTEXTS.values(), Dataset("tokens", digest, "unknown", data))


def _all_runs(client: MlflowClient, experiment: str) -> Iterable[Run]:
    token = None
    while True:
        page = client.search_runs([experiment], page_token=token)
        yield from page
        token = page.token
        if not token:
            return
