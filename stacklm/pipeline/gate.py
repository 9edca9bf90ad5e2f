"""`stacklm try`: writing the experiment, keeping earlier ones, and running from one look to the next."""

from __future__ import annotations

import contextlib
import io
import itertools
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from stacklm.code import beside, digest
from stacklm.config.model import Model, Python, own_code
from stacklm.config.schema import ParamsError, differing_fields, plain
from stacklm.data.shards import Shards
from stacklm.files import read_json, read_jsonl, remove, write_text
from stacklm.lab.experiment import Experiment, load_experiment
from stacklm.lab.gate import Gate, Pace, pace, written
from stacklm.lab.schedule import Lab, Planned, Records
from stacklm.lab.speed import seconds_per_step
from stacklm.lab.text import arms_table
from stacklm.lab.trial import JUDGED, Trial, certified
from stacklm.pipeline.code import changed_units, shortened
from stacklm.pipeline.lab import Files, trial_of
from stacklm.pipeline.project import EXPERIMENTS, Project
from stacklm.pipeline.trials import failures, run_here
from stacklm.plan.memory import training_memory
from stacklm.progress import progress
from stacklm.train.metrics import METRICS
from stacklm.units import quantity

SOURCES = "sources"
"""Folder in experiments/ with copies of users' files, each in a subfolder named by a hash of its content."""
BAR = "{l_bar}{bar}| {n:.1f} of {total} training runs, {elapsed} elapsed"
HEAD = "Written by `stacklm try`, which resumes it. The looks were declared before the first trial."


def open_gate(project: Project, name: str, made: Experiment, again: bool) -> tuple[Files, Lab]:
    """Open the gate of that name for the experiment `made`: resume it if it is the same but for the judging seeds, else start it.

    If a gate of that name has records, but its settings, tokens or code differ, it is started over only with `again`, and
    the earlier one is kept as NAME-old1 and so on. No gate judges on seeds with which its candidate was trained before.
    Raises `ParamsError` that names what changed.
    """
    ((mine, candidate),) = made.candidates.items()
    candidate = replace(candidate, model=with_source(project, candidate.model))
    files, first, made = Files(project, name), 1, replace(made, candidates={mine: candidate})
    if files.file.exists():
        before = load_experiment(files.file)
        first = before.seeds.judge[0]
        changed = _changed(files, before, with_seeds(made, first))
        if not (changed or again):
            return files, files.begin()
        kept = _kept(files, attempt(files))
        if files.recorded and not again:
            raise ParamsError(
                f"{name} was started before {changed} changed: --again starts over and keeps the earlier one as {kept.name}; "
                "--name NAME starts this one under another name"
            )
        if files.recorded:
            files.move(kept)
        else:
            remove(files.origin.parent)
    seen = {
        trial.train.seed  # with any learning rate and number of steps, in any experiment
        for trial in map(trial_of, files.records().values())
        if trial and candidate.model and trial.model.architecture == candidate.model.architecture
    }
    while seen.intersection(with_seeds(made, first).seeds.judge):
        first += len(made.seeds.judge)
    write_text(files.file, written(with_seeds(made, first), HEAD))
    files = Files(project, name)  # without cached values of the earlier file
    return files, files.begin()


def _changed(files: Files, before: Experiment, now: Experiment) -> str:
    """What has changed since the gate started, in short; empty if nothing has."""
    keys = [key for key in differing_fields(plain(before), plain(now)) if not key.endswith("architecture.path")]
    began = files.began().get("models", {})
    for name, one in now.candidates.items():
        keys += changed_units(began[name], own_code(one.model.architecture)) if one.model and name in began else []
    return shortened(keys) or files.changed(files.present())


def with_source(project: Project, model: Model | None) -> Model | None:
    """The model with its file, and what this imports from the same folder, copied to `SOURCES`; unchanged if it has no file.

    The copy preserves the code that was tried: the user's file may change, also while trials run.
    """
    if model is None or not isinstance(model.architecture, Python):
        return model
    file = model.architecture.file(project.root)
    folder = project.root / EXPERIMENTS / SOURCES / f"{file.stem}-{digest(own_code(model.architecture, project.root))[:8]}"
    for name, path in beside(file)[0].items():
        if not (folder / name).exists():
            write_text(folder / name, path.read_text(encoding="utf-8"))
    place = (folder / file.name).relative_to(project.root).as_posix()
    return replace(model, architecture=replace(model.architecture, path=place))


def attempt(files: Files) -> int:
    """How often a gate of this name has been started, including this time."""
    return next(number for number in itertools.count(1) if not _kept(files, number).file.exists())


def _kept(files: Files, number: int) -> Files:
    return Files(files.project, f"{files.name}-old{number}")


def with_seeds(experiment: Experiment, first: int) -> Experiment:
    """The experiment with the same number of judging seeds, starting from `first`."""
    seeds = experiment.seeds
    return replace(experiment, seeds=replace(seeds, judge=tuple(range(first, first + len(seeds.judge)))))


def audited(files: Files, lab: Lab) -> str:
    """Audit both arms as their trials would; return a line about it. Raises `AuditError` that names the faults."""
    data, counts = Shards.open(files.shards), []
    for arm in lab.arms:
        with contextlib.redirect_stdout(io.StringIO()):
            path = certified(lab.trial(arm, arm.model.optimizer.peak_lr, lab.experiment.seeds.tune[0]), data, files.work)
        counts.append(f"{arm.name} passed all {len(read_json(path)['checks'])} checks")
    return f"audit: {', '.join(counts)}"


def planned(files: Files, lab: Lab) -> tuple[Pace, str]:
    """Measure the speed of the arms; return it with a text on the cost of each look and the smallest detectable difference."""
    splits = Shards.open(files.shards).splits
    scored = sum(splits[split]["tokens"] for split in JUDGED)
    found = pace(lab, seconds_per_step(lab.arms, files.vocab_size), scored, files.at_once(lab))
    memory = [f"{arm.name} {quantity(training_memory(arm.model, files.vocab_size, arm.train).total, 'B')}" for arm in lab.arms]
    lines = [
        lab.experiment.question,
        "",
        arms_table(lab),
        f"held equal: {lab.experiment.budget}",
        f"memory per training run: {', '.join(memory)}",
        "",
        Gate(lab, files.records(), found).table(),
    ]
    return found, "\n".join(lines)


def run_looks(files: Files, lab: Lab, found: Pace, go_on: Callable[[Gate], bool]) -> Gate:
    """Train look by look until a verdict, the last look, or `go_on` declines the next one; it is not asked about the first.

    Raises `RuntimeError` if trials failed after all tries.
    """
    while True:
        gate = Gate(lab, files.records(), found)
        if gate.next_look is None or (gate.look and not go_on(gate)):
            return gate
        found = _train(files, replace(lab, pause=gate.next_look), found, f"look {gate.look + 1} of {len(gate.looks)}")


def _train(files: Files, lab: Lab, found: Pace, title: str) -> Pace:
    """Train for one look; return the measured pace."""
    began, trained = time.monotonic(), []
    with progress(desc=title, bar_format=BAR, delay=1) as bar, _course(lab, files, bar) as move:

        def say(planned: Planned, records: Records, done: int, left: int) -> None:
            trained.append(planned.arm)
            move(records)
            bar.write(Gate(lab, records, found).line(planned, left), file=sys.stdout)

        broken = run_here(lab, files, found.at_once, say)
    if broken:
        raise RuntimeError(failures(broken))
    return found.corrected(trained, time.monotonic() - began)


@contextlib.contextmanager
def _course(lab: Lab, files: Files, bar: tqdm) -> Iterator[Callable[[Records], None]]:
    """A function that updates the bar; on a terminal a thread does so too, every second, from the steps of running trials."""
    known, ended = files.records(), threading.Event()
    before = len(lab.done(known))

    def move(records: Records | None = None) -> None:
        nonlocal known
        known = dict(records or known)
        done, pending = len(lab.done(known)) - before, lab.pending(known)
        judging = 0 if lab.tuning(known, 1.0).complete else len(lab.arms) * (lab.pause or 0)
        with bar.get_lock():
            bar.total = done + len(pending) + judging
            bar.n = done + sum(_share(files.work, planned.trial) for planned in pending)
        bar.refresh()

    def watch() -> None:
        while not ended.wait(1):
            move()

    move()
    if sys.stderr.isatty():
        threading.Thread(target=watch, daemon=True).start()
    try:
        yield move
    finally:
        ended.set()


def _share(work: Path, trial: Trial) -> float:
    """The fraction of a trial's steps that is done."""
    rows = read_jsonl(work / "trials" / trial.identity / "run" / METRICS)
    return rows[-1]["step"] / trial.train.last_step if rows else 0.0


def result(files: Files, gate: Gate) -> dict[str, Any]:
    """The result for scripts; writes the report."""
    return {"experiment": files.name, "attempt": attempt(files), **gate.plain(), "report": str(files.write_report())}
