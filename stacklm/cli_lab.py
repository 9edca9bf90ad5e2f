"""`stacklm lab`: what an experiment takes, how far it is, and what it found. `stacklm run-flow lab NAME` runs it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from stacklm.lab.schedule import Lab
    from stacklm.pipeline.lab import Files

app = typer.Typer(no_args_is_help=True, help="Experiments: plan, status and verdicts. `stacklm run-flow lab NAME` runs one.")

Name = Annotated[str, typer.Argument(help="An experiment: the name of a file in experiments/, without .yaml.")]


@app.command()
def plan(
    name: Name,
    latency: Annotated[
        bool, typer.Option("--latency", help="Measure how long each arm takes to decode a token; the report shows it, too.")
    ] = False,
) -> None:
    """Say what an experiment takes and what its seeds can see, before it runs."""
    from stacklm.lab.text import differences_table, plan_text

    files, lab, workers = _opened(name)
    if latency:
        files.measure_latency()
    print(f"{plan_text(lab, files.records(), workers, files.latency())}\n\n{differences_table(lab)}")


@app.command()
def run(name: Name) -> None:
    """Run what is left of an experiment without Prefect, on the tokens that are there. The stages in experiments/dvc.yaml do so."""
    from stacklm.pipeline.locks import hold_project
    from stacklm.pipeline.trials import run_here
    from stacklm.pipeline.watchdog import exit_with_entry_point

    exit_with_entry_point()
    files, _, workers = _opened(name)
    with hold_project(files.project, f"lab run {name}", wait=True):
        lab = files.begin()
        broken = run_here(lab, files, workers)
    _show(files, lab)
    if broken:
        raise RuntimeError("\n".join([f"{len(broken)} trials failed; the same command tries them again", *broken.values()]))


@app.command()
def status(name: Name) -> None:
    """Say which trials are done and which come next, and how long they take."""
    from stacklm.lab.text import status_text

    files, lab, workers = _opened(name)
    print(status_text(lab, files.records(), workers))


@app.command()
def show(name: Name) -> None:
    """Print the verdicts so far and write the report, from the records and without training."""
    files, lab, _ = _opened(name)
    _show(files, lab)


@app.command()
def correlate(
    text: Annotated[str, typer.Argument(help="An experiment on text.")],
    probe: Annotated[str, typer.Argument(help="An experiment on a synthetic task, with arms of the same names.")],
) -> None:
    """Say how well a synthetic task predicts bits per byte over the arms of two experiments, and write a report of it."""
    from stacklm.lab.correlation import correlate
    from stacklm.report.lab.correlation import sentence, write

    files, other = _opened(text)[0], _opened(probe)[0]
    found = correlate(files.findings(), other.findings())
    folder = files.report.parent / f"correlation-{probe}"
    write(found, text, probe, folder)
    print(f"{probe} and {text}: {sentence(found)}\n\nread the report: {folder / 'index.html'}")


def verify(
    name: Name,
    trial: Annotated[str, typer.Argument(help="The beginning of its identity, as in the report or in records/.")],
) -> None:
    """Train one trial of an experiment again and compare it with its record. The exit code is 1 where it is not reproduced."""
    from stacklm.pipeline.verify import verify

    found = verify(_opened(name)[0], trial)
    print(found.text())
    raise typer.Exit(0 if found.passed else 1)


def _show(files: Files, lab: Lab) -> None:
    from stacklm.lab.text import result_text

    print(result_text(lab, files.records()))
    if (page := files.write_report()).exists():
        print(f"\nread the report: {page}")


def _opened(name: str) -> tuple[Files, Lab, int]:
    from stacklm.pipeline.lab import Files
    from stacklm.pipeline.project import Project, trainings_at_once

    files = Files(Project.find(), name)
    lab = files.lab()
    return files, lab, trainings_at_once(lab.settings)
