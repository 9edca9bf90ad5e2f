"""The first commands of a new user: `stacklm doctor`, `stacklm init` and `stacklm leak`. All work outside a project."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def doctor() -> None:
    """Check Python, packages, torch, memory, disk, git, DVC, MLflow, Prefect, network, ports and settings, with advice.

    Exits with 1 if the main job (`stacklm run-flow pretrain`) cannot run.
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


def init(
    folder: Annotated[Path, typer.Argument(help="New or empty folder.")],
) -> None:
    """Create a project under git and DVC, ready to run: settings, a small GPT to edit, and an experiment."""
    from stacklm.pipeline.init import create

    error = create(folder)
    print(f"created {folder}: my_model.py, a small GPT to edit, and a dense model of equal size to compare it with\n")
    if error:
        print(f"nothing is committed yet: {error.splitlines()[-1]}\n`stacklm doctor` says how to set up git\n")
    for command, what in (
        (f"cd {folder}", ""),
        ("stacklm run-flow pretrain", "train both with three seeds and compare them"),
        ("stacklm try mine", "test whether my_model.py is better"),
        ("stacklm lab plan my-model", "plan the same comparison as an experiment"),
    ):
        print(f"  {command:<28}{what}".rstrip())


def leak(
    out: Annotated[Path, typer.Option(help="Folder for the report.")] = Path(".stacklm/leak"),
) -> None:
    """Show in a minute what leaks seem to gain, and that the audit names each of them.

    The leaks are a wrong mask, overlapping windows, and padding in the loss.
    """
    from stacklm.lab.leak import run_cases
    from stacklm.pipeline.project import processors
    from stacklm.report.leak import certificate, summary, write_page

    outcomes = run_cases(processors(), lambda one: print(f"{one.case}: {certificate(one)}", flush=True))
    print(f"\n{summary(outcomes)}\n\nread what it means: {write_page(outcomes, out)}")
