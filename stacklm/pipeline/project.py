"""The location of a project: its checkout, and the folder for its unversioned state."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from stacklm.config.schema import ParamsError
from stacklm.config.train import Train
from stacklm.files import project_root

STATE, EXPERIMENTS = ".stacklm", "experiments"


@dataclass(frozen=True)
class Project:
    """`root` holds params.yaml, dvc.yaml and the outputs; `state` holds work in progress, tracking and logs.

    A temporary DVC experiment has its own root and shares the main checkout's state, so that its runs appear
    beside the others and resume where they stopped.
    """

    root: Path
    state: Path

    @classmethod
    def find(cls, start: Path | None = None) -> Project:
        """The project that contains `start` (default: the current directory). Raises `ParamsError` outside a project."""
        root = project_root(start)
        if root is None:
            here = (start or Path.cwd()).resolve()
            raise ParamsError(f"{here}: not inside a stacklm project (no dvc.yaml here or above); change to its folder")
        # DVC puts a temporary experiment in .dvc/tmp/exps of the checkout where it was started.
        main = next((folder.parents[2] for folder in root.parents if folder.match(".dvc/tmp/exps")), root)
        return cls(root, main / STATE)

    @property
    def params_file(self) -> Path:
        return self.root / "params.yaml"


def experiments(project: Project) -> list[str]:
    """The names of the project's experiments, which are the files in experiments/."""
    return sorted(path.stem for path in (project.root / EXPERIMENTS).glob("*.yaml") if path.name != "dvc.yaml")


def check_tools(project: Project | None) -> None:
    """Raise `ParamsError`, which says what to do, unless git and DVC are installed and, given a project, usable in it."""
    if importlib.util.find_spec("dvc") is None:
        raise ParamsError(f"DVC is not installed for {sys.executable}: `{sys.executable} -m pip install 'dvc>=3.60'`")
    if shutil.which("git") is None:
        raise ParamsError("no `git` on the PATH: install git, which DVC needs")
    if project is None:
        return
    if not (project.root / ".dvc").is_dir():
        raise ParamsError(f"{project.root}: not a DVC repository (no .dvc): run `dvc init` there")
    if not any((folder / ".git").exists() for folder in (project.root, *project.root.parents)):
        raise ParamsError(f"{project.root}: not a git repository: run `git init` there")


def environment() -> dict[str, str]:
    """The environment for child processes: this interpreter's programs come first on the PATH, output is unbuffered."""
    return {
        **os.environ,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        "PYTHONUNBUFFERED": "1",
        "DVC_NO_ANALYTICS": "1",
    }


def trainings_at_once(train: Train, memory: Callable[[], int] | None = None) -> int:
    """The number of parallel training runs: as many as there are processors for their threads, but one on an accelerator.

    With `memory`, which returns the bytes that the largest of them needs, an NVIDIA GPU runs as many as fit its free memory.
    """
    here = max(1, processors() // (train.threads * train.nproc))
    accelerated = bool(shutil.which("nvidia-smi")) or platform.system() == "Darwin"
    if train.device == "cpu" or (train.device == "auto" and not accelerated):
        return here
    free = free_gpu_memory() if memory and train.device != "mps" else None
    return max(1, min(here, free // memory())) if memory and free is not None else 1


def free_gpu_memory() -> int | None:
    """Free memory of the first NVIDIA GPU in bytes; None without a GPU."""
    free = nvidia_smi("memory.free", "nounits")
    return int(free) * 2**20 if free.isdigit() else None


def nvidia_smi(query: str, *options: str) -> str:
    """The driver's answer to a query about the first NVIDIA GPU; empty without a GPU."""
    if shutil.which("nvidia-smi") is None:
        return ""
    command = ["nvidia-smi", f"--query-gpu={query}", f"--format={','.join(('csv', 'noheader', *options))}"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip().partition("\n")[0] if done.returncode == 0 else ""


def processors(quota: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """The number of processors that this process may use, limited by its CPU affinity and its container's quota.

    `quota` is Linux's file with that quota: microseconds of CPU time, or `max`, and the period in microseconds.
    """
    bound = getattr(psutil.Process(), "cpu_affinity", None)  # macOS has no CPU affinity
    found = len(bound()) if bound else os.cpu_count() or 1
    limit, period = quota.read_text(encoding="ascii").split() if quota.is_file() else ("max", "1")
    return found if limit == "max" else min(found, max(1, int(limit) // int(period)))
