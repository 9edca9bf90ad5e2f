"""A project with fast stages: the real stages, settings, DVC and Prefect, but scripts that do the work."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

from flows.server import Server
from stacklm.pipeline.stages import STAGES, Instance, Stage
from support import ROOT, wait_for
from support.checkout import TINY_PARAMS, Checkout

EVERYTHING = [
    *("inputs", "download", "tokenizer", "shards", "audit@stacked", "audit@dense"),
    *("pretrain@stacked-1", "pretrain@dense-1", "evaluate@stacked-1", "evaluate@dense-1", "compare"),
]

WORK = '''\
"""Make the outputs named on the command line; note what ran; fail, hang or meet as files of those names ask."""
import json, sys, time
from pathlib import Path
from stacklm.pipeline.watchdog import exit_with_entry_point

exit_with_entry_point()
end = time.time() + 240
address, *outputs = sys.argv[1:]
if Path("fail").exists() and Path("fail").read_text() == address:
    sys.exit(f"{address} found a loss that is not finite")
Path(f"began-{address}").touch()
print(f"{address} at work")
print(f"{address}:  50%|#####     | 5/10 [00:00<00:00, 99.0step/s]", file=sys.stderr, flush=True)
if address.startswith("pretrain"):
    work = Path(".stacklm/work") / f"{address}-0123"
    work.mkdir(parents=True, exist_ok=True)
    (work / "metrics.jsonl").write_text('{"step": 6}\\n')
while Path("hang").exists():
    if time.time() > end:
        sys.exit("left alone")
    time.sleep(0.05)
while Path("meet").exists() and address.startswith("pretrain") and len(list(Path().glob("began-pretrain*"))) < 2:
    if time.time() > end:
        sys.exit("nobody came")
    time.sleep(0.05)
with open("ran.txt", "a") as log:
    print(address, file=log)
scores = {"loss": 2.0, "bits_per_byte": 1.5}
facts = {"seeds": {"1": scores}, "total_parameters": 9, "tokens": 8, "training_flops": 7, "valid": scores, "test": scores}
comparison = {"finding": "dense is the best", "models": {"dense": facts}}
for output in map(Path, outputs):
    if output.suffix:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(comparison))
    else:
        output.mkdir(parents=True, exist_ok=True)
        (output / "report.md").write_text("# Report\\n\\n![loss](loss.png)\\n\\nThe end.\\n")
'''


def make_project(root: Path) -> Checkout:
    root.mkdir()
    (root / "params.yaml").write_text(TINY_PARAMS)
    (root / "work.py").write_text(WORK)
    (root / "dvc.yaml").write_text(json.dumps({"stages": {stage.name: _definition(stage) for stage in STAGES}}))
    project = Checkout(root)
    project.run("git", "init", "-q")
    for name in (".dvc/config", ".dvc/.gitignore", ".dvcignore"):  # as `dvc init`, and without its look for updates
        (root / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(ROOT / name, root / name)
    return project


def _definition(stage: Stage) -> dict[str, Any]:
    item = Instance(stage, *(f"${{item.{name}}}" for name in stage.per))
    reads, writes = ([item.fill(path) for path in paths.values()] for paths in (stage.reads, stage.writes))
    return {
        **({"matrix": {name: f"${{{name}s}}" for name in stage.per}} if stage.per else {}),
        **({"always_changed": True} if stage.always else {}),
        "cmd": f'"{sys.executable}" work.py {item.address} {" ".join(writes)}',
        "deps": reads,
        "outs": writes,
    }


def flow(project: Checkout, server: Server, name: str = "pretrain", **keywords) -> str:
    """Run a flow to its end against a server; return its output."""
    return project.stacklm("run-flow", name, PREFECT_API_URL=server.url, **keywords)


def start_hanging_flow(
    root: Path, name: str = "pretrain", *, launcher: Sequence[str] = (), **environment: str
) -> tuple[Checkout, subprocess.Popen]:
    """A new project, and a flow that stays in its first stage until the file `hang` is removed."""
    project = make_project(root)
    (root / "hang").touch()
    running = project.start(*launcher, sys.executable, "-m", "stacklm", "run-flow", name, **environment)
    wait_for((root / "began-inputs").exists, seconds=300)
    return project, running


def ran(project: Checkout) -> list[str]:
    """The stages that ran so far, except `inputs`, which always runs."""
    return [line for line in (project.root / "ran.txt").read_text().split() if line != "inputs"]


def ask(server: Server, path: str, **query: Any) -> Any:
    """Send a request to the server's REST API."""
    return httpx.post(f"{server.url}/{path}", json=query, timeout=60).raise_for_status().json()


def flow_runs(project: Checkout, server: Server) -> list[dict]:
    """The flow runs that took this project's lock, oldest first."""
    place = f"{platform.node()}:{project.root}"
    return [run for run in ask(server, "flow_runs/filter", sort="START_TIME_ASC") if run["labels"].get("stacklm.project") == place]


def task_states(server: Server, run: dict) -> dict[str, str]:
    """The state of each task run of a flow run. The server records them shortly after the flow ends."""

    def states() -> dict[str, str]:
        found = ask(server, "task_runs/filter", flow_runs={"id": {"any_": [run["id"]]}})
        return {task["name"]: task["state_name"] for task in found}

    wait_for(lambda: not {"Running", "Pending"} & set(states().values()))
    return states()
