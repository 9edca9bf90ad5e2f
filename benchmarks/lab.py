"""Overhead of a lab trial: CPU seconds besides training, for processes, files, the certificate, Prefect and its server.

    python benchmarks/lab.py [--trials 20]

Run it in a project that has token shards (`dvc repro shards`). Trials of a tiny model run as in `stacklm run-flow lab`, one at
a time, and are then trained and scored again in this process without the flow. The difference is the overhead; the target is
below 2 s. Startup and shutdown are excluded: the first trial does not count.
"""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
import time
from pathlib import Path

import psutil
from bench import command_line

from flows.server import connect
from stacklm.console import table
from stacklm.data.shards import Shards
from stacklm.files import sha256
from stacklm.lab.trial import certified, score_documents
from stacklm.model.store import load_model
from stacklm.pipeline.lab import Files
from stacklm.pipeline.project import Project
from stacklm.train.pretrain import pretrain

AIM = 2.0
EXPERIMENT = {
    "question": "What does a trial take beside training?",
    "refuted_by": f"more than {AIM} CPU seconds",
    "budget": "parameters",
    "margin": 0.005,
    "baseline": {
        "architecture": {"kind": "dense", "d_model": 32, "n_heads": 2, "n_layers": 2, "d_ff": 128},
        "optimizer": {"peak_lr": 4e-3},
    },
    "candidates": {"swiglu": {"change": {"architecture.ffn": "swiglu"}}},
    "rates": 3,
    "train": {"max_steps": 20, "warmup_steps": 2, "eval_every": 20, "checkpoint_every": 20, "threads": 1},
}


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--trials", type=int, default=20, help="number of trials, at least 12")
    wanted = parser.parse_args().trials
    project = Project.find()
    with tempfile.TemporaryDirectory() as folder:
        copy = Project(Path(folder), Path(folder) / ".stacklm")
        (copy.root / "params.yaml").write_bytes(project.params_file.read_bytes())
        (copy.root / "out").mkdir()
        (copy.root / "out" / "shards").symlink_to(project.root / "out" / "shards", target_is_directory=True)
        seeds = {"tune": [101], "judge": list(range(1, wanted // 2 - 2))}  # 3 rates for each of two arms
        files = Files(copy, "cost")
        files.file.parent.mkdir()
        files.file.write_text(json.dumps(EXPERIMENT | {"seeds": seeds}), encoding="utf-8")
        around, trials = through_the_flow(files)
        alone = without_anything(files, trials)
    print(f"{len(trials)} trials of {EXPERIMENT['train']['max_steps']} steps, CPU seconds for each:")
    rows = {"through the flow": around, "trained and scored in one process": alone, "the machinery": around - alone}
    print(table(["", ""], [(name, f"{seconds:.2f}") for name, seconds in rows.items()]))
    print(f"aim: below {AIM}")


def through_the_flow(files: Files) -> tuple[float, list]:
    """CPU seconds per trial of this process and all its children, for all trials but the first; and those trials."""
    server = connect(files.work / "prefect")
    from prefect import flow
    from prefect.task_runners import ThreadPoolTaskRunner

    from flows.lab import tasks
    from stacklm.pipeline.trials import run_trials

    if server:
        server.wait()
    found, used = files.begin(), []

    @flow(validate_parameters=False)
    def cost() -> None:
        with ThreadPoolTaskRunner(max_workers=1) as runner:
            start = tasks(files, runner)

            def noted(planned, ended) -> None:
                used.append((cpu(), planned.trial))
                start(planned, ended)

            with contextlib.redirect_stdout(io.StringIO()):
                broken = run_trials(found, files, noted, at_once=1)
            used.append((cpu(), None))
        if broken:
            raise RuntimeError(broken)

    cost()
    trials = [trial for _, trial in used[1:-1]]
    return (used[-1][0] - used[1][0]) / len(trials), trials


def without_anything(files: Files, trials: list) -> float:
    """CPU seconds per trial if the trials are trained and scored in this process."""
    data, seconds = Shards.open(files.shards), 0.0
    for trial in trials:
        assert trial.data == sha256(files.shards / "manifest.json")
        certificate = certified(trial, data, files.work)
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            trained, begin = Path(folder) / "model", time.process_time()
            pretrain(trial.train, trial.model, files.shards, certificate, trained, Path(folder) / "timing", Path(folder) / "run")
            model, config = load_model(trained)
            for split in ("valid", "test"):
                score_documents(model, data, split, config.context_length, 16)
            seconds += time.process_time() - begin
    return seconds / len(trials)


def cpu() -> float:
    """CPU seconds of this process and its children so far, including children that have exited."""
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    times = [process.cpu_times() for process in processes]
    return sum(t.user + t.system + getattr(t, "children_user", 0) + getattr(t, "children_system", 0) for t in times)


if __name__ == "__main__":
    main()
