"""Where a project is: the checkout that is worked on, and the place of what is not versioned."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from stacklm.config.schema import ParamsError

STATE = ".stacklm"


@dataclass(frozen=True)
class Project:
    """`root` holds params.yaml, dvc.yaml and the outputs; `state` holds work in progress, tracking and logs.

    A temporary DVC experiment has a root of its own and shares the main checkout's state, so that its runs are
    seen beside the others and resume where they stopped.
    """

    root: Path
    state: Path

    @classmethod
    def find(cls, start: Path | None = None) -> Project:
        """The project around `start` (default: the current directory): the nearest folder above with a dvc.yaml.

        Raises `ParamsError` outside a project.
        """
        start = (start or Path.cwd()).resolve()
        for root in (start, *start.parents):
            if (root / "dvc.yaml").is_file():
                return cls(root, _main_checkout(root) / STATE)
        raise ParamsError(f"{start}: not inside a stacklm project (no dvc.yaml here or above); change to your checkout")

    @property
    def params_file(self) -> Path:
        return self.root / "params.yaml"


def _main_checkout(root: Path) -> Path:
    """The checkout a temporary experiment was started from: DVC keeps those below its .dvc/tmp/exps."""
    for parent in root.parents:
        if parent.name == "exps" and parent.parent.name == "tmp" and parent.parent.parent.name == ".dvc":
            return parent.parent.parent.parent
    return root


def environment() -> dict[str, str]:
    """The environment for child processes: this interpreter's programs come first, output is not held back."""
    import sys

    return {
        **os.environ,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        "PYTHONUNBUFFERED": "1",
        "DVC_NO_ANALYTICS": "1",
    }
