"""The first commands of a new user: `stacklm doctor`, `stacklm init` and `stacklm leak`. All work outside a project."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

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


def leak(
    out: Annotated[Path, typer.Option(help="Folder for the page.")] = Path(".stacklm/leak"),
) -> None:
    """Show in a minute what leaks pretend to gain: a wrong mask, overlapping windows, padding in the loss, each by its name."""
    from stacklm.lab.leak import run_cases
    from stacklm.pipeline.project import processors
    from stacklm.report.leak import certificate, summary, write_page

    outcomes = run_cases(processors(), lambda one: print(f"{one.case}: {certificate(one)}", flush=True))
    print(f"\n{summary(outcomes)}\n\nread what it means: {write_page(outcomes, out)}")
