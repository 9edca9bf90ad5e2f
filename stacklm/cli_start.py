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


def init(
    folder: Annotated[Path, typer.Argument(help="A new or empty folder.")],
) -> None:
    """Make a new project: settings, a small GPT to edit, an experiment, under git and DVC. Everything runs in it at once."""
    from stacklm.pipeline.init import create

    committed = create(folder)
    print(f"made {folder}: my_model.py, a small GPT to edit, and a dense one of equal size to compare it with\n")
    if not committed:
        print("nothing is committed, since git does not know who you are; `stacklm doctor` says what to do\n")
    for command, what in (
        (f"cd {folder}", ""),
        ("stacklm run-flow pretrain", "trains both with three seeds and compares them"),
        ("stacklm try mine", "a verdict on my_model.py, seed by seed"),
        ("stacklm lab plan my-model", "the same question as an experiment"),
    ):
        print(f"  {command:<28}{what}".rstrip())


def leak(
    out: Annotated[Path, typer.Option(help="Folder for the page.")] = Path(".stacklm/leak"),
) -> None:
    """Show in a minute what leaks pretend to gain: a wrong mask, overlapping windows, padding in the loss, each by its name."""
    from stacklm.lab.leak import run_cases
    from stacklm.pipeline.project import processors
    from stacklm.report.leak import certificate, summary, write_page

    outcomes = run_cases(processors(), lambda one: print(f"{one.case}: {certificate(one)}", flush=True))
    print(f"\n{summary(outcomes)}\n\nread what it means: {write_page(outcomes, out)}")
