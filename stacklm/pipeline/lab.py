"""The experiments of a project: their files, the records of their trials, and the tokens, settings and code of these.

    experiments/NAME.yaml            the experiment
    experiments/NAME/origin.json     the tokens, settings and code with which its trials were made
    experiments/NAME/records/ID.json one small record per trial; all of them belong in git
    experiments/NAME/latency.json    the decoding time per token of each arm, if measured
    experiments/NAME/report/         the report, made from these

Work in progress and weights are in `.stacklm/lab`; experiments share equal trials there.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from stacklm.code import digest
from stacklm.config.model import Model, own_code
from stacklm.config.params import Params, load
from stacklm.config.schema import ParamsError, differing_fields, listed, nearest, plain, read
from stacklm.config.train import Train
from stacklm.files import read_json, sha256, write_json
from stacklm.lab import probes
from stacklm.lab.claims import MEASURED, Claim, claims
from stacklm.lab.diagnostics import correlate
from stacklm.lab.experiment import Experiment, arms, load_experiment, settings
from stacklm.lab.findings import Findings
from stacklm.lab.schedule import Lab
from stacklm.lab.speed import Latency, decode_latency, seconds_per_step
from stacklm.lab.text import short_text
from stacklm.lab.trial import Trial
from stacklm.pipeline.code import LAB, changed_units, joined, shortened
from stacklm.pipeline.project import EXPERIMENTS, Project, check_tools, environment, experiments, trainings_at_once
from stacklm.pipeline.stages import Instance, stage
from stacklm.plan.memory import training_memory

LATENCY = "latency.json"
ACCEPTED = "accepted"
"""Key in origin.json: digests of later code that gave bit-identical weights, with a reason and the trials that showed it."""


@dataclass(frozen=True)
class Files:
    """The files of one experiment of a project."""

    project: Project
    name: str

    @property
    def file(self) -> Path:
        return self.project.root / EXPERIMENTS / f"{self.name}.yaml"

    @property
    def origin(self) -> Path:
        return self.project.root / EXPERIMENTS / self.name / "origin.json"

    @property
    def report(self) -> Path:
        return self.origin.parent / "report"

    @property
    def shards(self) -> Path:
        """The project's tokens, or those of the experiment's synthetic task."""
        if probe := self.experiment.probe:
            return self.work / "probes" / digest(plain(probe))[:16]
        return Instance(stage("shards")).made(self.project.root)["shards"]

    @property
    def work(self) -> Path:
        return self.project.state / "lab"

    @cached_property
    def experiment(self) -> Experiment:
        """The experiment as read from its file. Raises `ParamsError` with the known names if there is none of this name."""
        if not self.file.is_file():
            names = experiments(self.project)
            raise ParamsError(
                f"no experiment {self.name!r} ({EXPERIMENTS}/{self.name}.yaml); there {'is' if len(names) == 1 else 'are'} "
                f"{listed(names) or 'none'}{nearest(self.name, names)}"
            )
        return load_experiment(self.file)

    @cached_property
    def params(self) -> Params:
        """The project's settings; once the experiment has started, with the training settings and vocabulary size of its trials."""
        params, origin = load(self.project.params_file), self.began()
        if "train" not in origin:
            return params
        vocabulary = replace(params.tokenizer, vocab_size=origin["vocab_size"])
        return replace(params, train=read(Train, origin["train"]), tokenizer=vocabulary)

    @property
    def vocab_size(self) -> int:
        """Vocabulary size of the project's tokens, or of the experiment's synthetic task."""
        probe = self.experiment.probe
        return probes.vocab_size(probe) if probe else self.params.tokenizer.vocab_size

    def check(self) -> None:
        """Raise `ParamsError` unless all arms of the experiment can be built and meet its budget."""
        arms(self.experiment, self.params)

    def lab(self) -> Lab:
        """The experiment with the tokens and code of its trials; both are empty if it has not started."""
        origin = {"data": "", "code": {}} | self.began()
        found = arms(self.experiment, self.params, origin.get("speeds"))
        own = {name: digest(code) for name, code in origin.get("models", {}).items()}
        return Lab(self.experiment, found, settings(self.experiment, self.params), origin["data"], digest(origin["code"]), own=own)

    def begin(self) -> Lab:
        """Start or resume the experiment with the current tokens, code and settings, which are stored as those of its trials.

        Raises `ParamsError` if it was started with others, or if there are no tokens.
        """
        now = self.present()
        if why := self.changed(now):
            raise ParamsError(
                f"{self.name}: {self.recorded} trials were made before {why} changed and must not be compared with later ones: "
                f"undo the change, or remove {EXPERIMENTS}/{self.name}/ to start over"
            )
        before = self.began()
        if self.experiment.budget == "seconds":
            now["speeds"] = before.get("speeds") or seconds_per_step(arms(self.experiment, self.params), self.vocab_size)
        if ACCEPTED in before:
            now[ACCEPTED] = before[ACCEPTED]
        write_json(self.origin, now)
        return replace(self).lab()  # a new object, which reads the settings again

    def changed(self, now: Mapping[str, Any]) -> str:
        """What differs between `now` and the start of the experiment; empty if nothing does, or if it has not started."""
        before = {key: value for key, value in self.began().items() if key not in ("speeds", ACCEPTED)}
        if not before or before == now:
            return ""
        models = (joined(one.get("models", {})) for one in (before, now))
        units = changed_units(before["code"], now["code"]) + changed_units(*models)
        keys = [f"train.{key}" for key in differing_fields(before.get("train", {}), now["train"])]
        return shortened(units or keys) or "its tokens"

    def at_once(self, lab: Lab) -> int:
        """The number of parallel trials: as many as there are processors for their threads and, on a GPU, as fit its free memory.

        The memory of a trial is the planned CPU memory of the largest arm: a CPU process takes about as much as a CUDA context.
        """

        def largest() -> int:
            return max(training_memory(arm.model, self.vocab_size, arm.train).total for arm in lab.arms)

        return trainings_at_once(lab.settings, largest)

    def move(self, to: Files) -> None:
        """Rename the experiment with its results. Raises `ParamsError` if there is already one of the new name."""
        if to.file.exists() or to.origin.parent.exists():
            raise ParamsError(f"an experiment {to.name} already exists")
        if self.origin.parent.exists():
            self.origin.parent.rename(to.origin.parent)
        self.file.rename(to.file)

    def records(self) -> dict[str, dict[str, Any]]:
        """The records of all experiments of the project, by the identity that `trial_of` gives their trials."""
        found = {}
        for path in sorted((self.project.root / EXPERIMENTS).glob("*/records/*.json")):
            stat = path.stat()
            identity, record = _read_record(path, stat.st_mtime_ns, stat.st_ino)
            found[identity] = record
        return found

    def findings(self) -> Findings:
        """The findings from the records so far."""
        return Findings(self.name, self.lab(), self.records(), self.latency())

    def latency(self) -> Latency | None:
        """The last measured decoding time per token of each arm; None if not measured."""
        path = self.origin.parent / LATENCY
        return read(Latency, read_json(path), path.name) if path.exists() else None

    def measure_latency(self) -> None:
        """Measure the decoding time per token of each arm on this machine and save it."""
        lab = self.lab()
        found = decode_latency(lab.arms, self.vocab_size, lab.settings.context_length)
        write_json(self.origin.parent / LATENCY, plain(found))

    def verdicts(self) -> str:
        """The question, and the findings so far in one sentence per candidate; or why the file cannot be used."""
        try:
            return short_text(self.findings())
        except ParamsError as error:
            return str(error)

    def write_report(self, findings: Findings | None = None) -> Path:
        """Write the report of the findings (default: the current ones), except for a synthetic task; return the path of its page.
        Equal records give an equal report."""
        from stacklm.report.lab.page import write

        if self.experiment.probe is None:
            write(findings or self.findings(), self.report)
        return self.report / "index.html"

    def write_correlation(self, task: Files) -> tuple[str, Path]:
        """Write a report on how well a synthetic task ranks the arms that it shares with this experiment on text; return a
        sentence and the path of the page. Raises `ParamsError` as `correlate` does."""
        from stacklm.report.lab.page import write_ranks

        found = correlate(self.findings(), task.findings())
        folder = self.report.parent / f"correlation-{task.name}"
        write_ranks(found, self.name, task.name, folder)
        return str(found), folder / "index.html"

    def save(self, record: dict[str, Any]) -> None:
        """Save the record of one trial."""
        write_json(self.record(record["identity"]), record)

    @property
    def recorded(self) -> int:
        """The number of records in its folder."""
        return len([*self.record("").parent.glob("*.json")])

    def record(self, identity: str) -> Path:
        """The file of one trial's record."""
        return self.origin.parent / "records" / f"{identity}.json"

    def began(self) -> dict[str, Any]:
        """The tokens, code and settings of its trials; empty before the first."""
        return read_json(self.origin) if self.origin.exists() else {}

    def present(self) -> dict[str, Any]:
        """The current tokens, code and settings. Raises `ParamsError` if there are no tokens.

        Code that was accepted as giving the same weights is replaced by the code with which the experiment was started.
        """
        manifest = self.shards / "manifest.json"
        if self.experiment.probe:
            probes.write_probe(self.experiment.probe, self.shards)
        if not manifest.is_file():
            raise ParamsError("there are no token shards yet: run `dvc repro shards`")
        params, experiment = load(self.project.params_file), self.experiment
        models = {"baseline": experiment.baseline} | {name: one.model for name, one in experiment.candidates.items()}
        codes = {name: own_code((model or experiment.baseline).architecture, self.project.root) for name, model in models.items()}
        models = {"models": found} if (found := {name: code for name, code in codes.items() if code}) else {}
        origin, code = self.began(), LAB.code(self.project.root)
        if digest(code) in [note["code"] for note in origin.get(ACCEPTED, [])]:
            code = origin["code"]
        return {
            "data": sha256(manifest),
            "vocab_size": params.tokenizer.vocab_size,
            "train": plain(settings(experiment, params)),
            "code": code,
            **models,
        }


@cache
def _read_record(path: Path, changed: int, inode: int) -> tuple[str, dict[str, Any]]:
    """The identity of the record's trial, and the record. Modification time and inode are part of the cache key, so that a
    record is read again only after a change: a report reads the many records of all experiments. The inode changes whenever a
    record is saved, whereas two saves may have the same time stamp."""
    record = read_json(path)
    trial = trial_of(record)
    return trial.identity if trial else path.stem, record


@cache
def _settings(kind: Any, text: str) -> Any:
    return read(kind, json.loads(text))


def trial_of(record: Mapping[str, Any]) -> Trial | None:
    """The trial of a record; settings added after it was made have their defaults. None if the record lacks the settings, as
    after divergence, or if they can no longer be read."""
    try:
        model, train = (_settings(kind, json.dumps(record[key])) for kind, key in ((Model, "model"), (Train, "train")))
    except (KeyError, ParamsError):
        return None
    return Trial(model, train, record["data"], record["code"], record.get("own", ""))


def claims_here(project: Project) -> list[Claim]:
    """The published claims, with the counts by this code and the results of the project's experiments."""
    return claims({name: Files(project, name).findings() for name in experiments(project) if name in MEASURED})


def bring_tokens(project: Project) -> None:
    """Run `dvc repro shards` if there are no token shards yet. Raises `ParamsError` and `RuntimeError`."""
    shards = Instance(stage("shards")).made(project.root)["shards"]
    if (shards / "manifest.json").is_file():
        return
    check_tools(project)
    print("there are no token shards yet: running dvc repro shards", flush=True)
    command = [sys.executable, "-m", "dvc", "repro", "shards"]
    code = subprocess.run(command, cwd=project.root, env=environment(), stdout=sys.stderr).returncode
    if code:
        raise RuntimeError(f"`dvc repro shards` failed with exit code {code}; see its messages above")
