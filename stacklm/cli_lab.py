"""`stacklm lab`: what an experiment takes, how far it is, and what it found. `stacklm run-flow lab NAME` runs it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from stacklm.cli_types import argument, experiments

if TYPE_CHECKING:
    from stacklm.lab.schedule import Lab
    from stacklm.pipeline.lab import Files

NAME = argument("An experiment: the name of a file in experiments/, without .yaml.", experiments)
Name = Annotated[str, NAME]
app = typer.Typer(no_args_is_help=True, help="Experiments: plan, status and verdicts. `stacklm run-flow lab NAME` runs one.")


@app.command()
def plan(
    name: Name,
    latency: Annotated[
        bool, typer.Option("--latency", help="Measure how long each arm takes to decode a token; the report shows it, too.")
    ] = False,
) -> None:
    """Say what an experiment takes and what its seeds can see, before it runs."""
    from stacklm.lab.text import differences_table, plan_text

    files, lab = _opened(name)
    if latency:
        files.measure_latency()
    print(f"{plan_text(lab, files.records(), files.at_once(lab), files.latency())}\n\n{differences_table(lab)}")


@app.command()
def run(name: Name) -> None:
    """Run what is left of an experiment without Prefect, on the tokens that are there. The stages in experiments/dvc.yaml do so."""
    from stacklm.pipeline.locks import hold_project
    from stacklm.pipeline.trials import failures, run_here
    from stacklm.pipeline.watchdog import exit_with_entry_point

    exit_with_entry_point()
    files, _ = _opened(name)
    with hold_project(files.project, f"lab run {name}", wait=True):
        lab = files.begin()
        broken = run_here(lab, files, files.at_once(lab))
    _show(files)
    if broken:
        raise RuntimeError(failures(broken))


@app.command()
def status(name: Name) -> None:
    """Say which trials are done and which come next, and how long they take."""
    from stacklm.lab.text import status_text

    files, lab = _opened(name)
    print(status_text(lab, files.records(), files.at_once(lab)))


@app.command()
def show(name: Annotated[str | None, NAME] = None) -> None:
    """Print the verdicts so far and write the report, from the records and without training; without a name, of all in short."""
    from stacklm.pipeline.lab import Files
    from stacklm.pipeline.project import Project, experiments

    if name is not None:
        return _show(_opened(name)[0])
    project = Project.find()
    found = {name: Files(project, name).verdicts() for name in experiments(project)}
    print("\n\n".join(f"{name}: {text}" for name, text in found.items()) or "there are no experiments (experiments/*.yaml)")
    if found:
        print("\n`stacklm lab show NAME` says more and writes a report")


@app.command()
def correlate(
    text: Annotated[str, argument("An experiment on text.", experiments)],
    probe: Annotated[str, argument("An experiment on a synthetic task, with arms of the same names.", experiments)],
) -> None:
    """Say how well a synthetic task predicts bits per byte over the arms of two experiments, and write a report of it."""
    found, page = _opened(text)[0].write_correlation(_opened(probe)[0])
    print(f"{probe} and {text}: {found}\n\nread the report: {page}")


@app.command()
def accept(
    name: Name,
    reason: Annotated[str, typer.Option(help="Why the change alters no result. It is kept in origin.json.")],
) -> None:
    """Let an experiment go on after a change of code: a trial of every arm is trained again and must give the same weights."""
    from stacklm.pipeline.verify import accept

    for line in accept(_with_tokens(name), reason):
        print(line, flush=True)
    print(f"accepted; `stacklm run-flow lab {name}` goes on with the present code")


def verify(
    name: Name,
    trial: Annotated[
        str | None,
        typer.Argument(help="The beginning of its identity, as in the report or in records/; by default the cheapest one judged."),
    ] = None,
) -> None:
    """Train one trial of an experiment again and compare it with its record. The exit code is 1 where it is not reproduced."""
    from stacklm.pipeline.verify import verify

    found = verify(_with_tokens(name), trial)
    print(found.text())
    raise typer.Exit(0 if found.passed else 1)


def _show(files: Files) -> None:
    from stacklm.lab.text import result_text

    findings = files.findings()
    print(result_text(findings))
    if (page := files.write_report(findings)).exists():
        print(f"\nread the report: {page}")


def _with_tokens(name: str) -> Files:
    """An experiment whose tokens are there; they are made where they are not."""
    from stacklm.pipeline.lab import bring_tokens

    files, _ = _opened(name)
    if files.experiment.probe is None:
        bring_tokens(files.project)
    return files


def _opened(name: str) -> tuple[Files, Lab]:
    from stacklm.pipeline.lab import Files
    from stacklm.pipeline.project import Project

    files = Files(Project.find(), name)
    lab = files.lab()
    return files, lab
