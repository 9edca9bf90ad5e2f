"""Time of each entry point in a project that is up to date, and of `--help`.

    python benchmarks/entry_points.py [--repeats 5]

Run it in a project in which `dvc repro` has finished. Figures are medians of interleaved runs in seconds; targets: 0.5 s for help,
5 s for `dvc repro`, 15 s for the flow (which starts its own Prefect server and stops it).
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path

from bench import command_line, timed

from stacklm.console import table
from stacklm.pipeline.project import Project, environment

COMMANDS = {
    "stacklm --help": ([sys.executable, "-m", "stacklm", "--help"], 0.5),
    "dvc repro": ([sys.executable, "-m", "dvc", "repro"], 5),
    "stacklm status": ([sys.executable, "-m", "stacklm", "status"], 5),
    "stacklm run-flow pretrain": ([sys.executable, "-m", "stacklm", "run-flow", "pretrain"], 15),
}


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    root = Project.find().root
    if "Everything is up to date" not in run(COMMANDS["stacklm status"][0], root):
        raise SystemExit("this project is not up to date: run `dvc repro` first")
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(repeats):
        for name, (command, _aim) in COMMANDS.items():
            seconds[name].append(timed(partial(run, command, root)).wall)
    rows = [
        (name, f"{statistics.median(seconds[name]):.2f}", f"{min(seconds[name]):.2f}", f"{aim:.1f}")
        for name, (_command, aim) in COMMANDS.items()
    ]
    print(f"seconds, {repeats} runs\n{table(('command', 'median', 'best', 'target'), rows)}")


def run(command: list[str], root: Path) -> str:
    """The output of a command, which must succeed."""
    return subprocess.run(command, cwd=root, env=environment(), capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    main()
