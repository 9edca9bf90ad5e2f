"""The first commands of a new user: `stacklm doctor`, `stacklm init` and `stacklm leak`. All work outside a project."""

from __future__ import annotations

import typer


def doctor() -> None:
    """Check this machine: Python, torch, memory, disk, git, DVC, MLflow, Prefect, network, ports; say what to do.

    The exit code is 1 where the main job cannot run.
    """
    from flows.server import users_server
    from stacklm.config.schema import ParamsError
    from stacklm.pipeline.doctor import examine, text
    from stacklm.pipeline.project import Project

    try:
        project = Project.find()
    except ParamsError:
        project = None
    findings = examine(project, users_server())
    print(text(findings))
    raise typer.Exit(1 if any(one.state == "missing" for one in findings) else 0)
