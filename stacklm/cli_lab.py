"""`stacklm lab`: plan an experiment, show its status and its verdicts. `stacklm run-flow lab NAME` runs it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from stacklm.cli_types import argument, experiments

if TYPE_CHECKING:
    from stacklm.lab.schedule import Lab
    from stacklm.pipeline.lab import Files

NAME = argument("Experiment: name of a file in experiments/, without .yaml.", experiments)
Name = Annotated[str, NAME]
app = typer.Typer(
    no_args_is_help=True, help="Plan experiments and show their status and verdicts; `stacklm run-flow lab NAME` runs one."
)


@app.command()
def plan(
    name: Name,
    latency: Annotated[
        bool, typer.Option("--latency", help="Also measure each arm's decoding time per token, and store it for the report.")
    ] = False,
) -> None:
    """Show an experiment's arms, trials, time and smallest detectable difference. Nothing is trained."""
    from stacklm.lab.text import differences_table, plan_text

    files, lab = _opened(name)
    if latency:
        files.measure_latency()
    print(f"{plan_text(lab, files.records(), files.at_once(lab), files.latency())}\n\n{differences_table(lab)}")


@app.command()
def run(name: Name) -> None:
    """Run the remaining trials of an experiment without Prefect, on the existing tokens.

    The stages in experiments/dvc.yaml call this.
    """
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
    """Show which trials are done, which come next, and the time left."""
    from stacklm.lab.text import status_text

    files, lab = _opened(name)
    print(status_text(lab, files.records(), files.at_once(lab)))


@app.command()
def show(name: Annotated[str | None, NAME] = None) -> None:
    """Print an experiment's verdicts so far and write its report, from the records. Nothing is trained.

    Without a name, print the verdicts of all experiments in short.
    """
    from stacklm.pipeline.lab import Files
    from stacklm.pipeline.project import Project, experiments

    if name is not None:
        return _show(_opened(name)[0])
    project = Project.find()
    found = {name: Files(project, name).verdicts() for name in experiments(project)}
    print("\n\n".join(f"{name}: {text}" for name, text in found.items()) or "there are no experiments (experiments/*.yaml)")
    if found:
        print("\n`stacklm lab show NAME` prints details and writes a report")


@app.command()
def correlate(
    text: Annotated[str, argument("Experiment on text.", experiments)],
    probe: Annotated[str, argument("Experiment on a synthetic task, with arms of the same names.", experiments)],
) -> None:
    """Measure how well a synthetic task predicts bits per byte, over the arms of two experiments, and write a report."""
    found, page = _opened(text)[0].write_correlation(_opened(probe)[0])
    print(f"{probe} and {text}: {found}\n\nread the report: {page}")


@app.command()
def accept(
    name: Name,
    reason: Annotated[str, typer.Option(help="Why the change does not alter results; stored in origin.json.")],
) -> None:
    """Allow an experiment to continue after a code change that does not alter its results.

    One trial of every arm is trained again and must give bit-identical weights.
    """
    from stacklm.pipeline.verify import accept

    for line in accept(_with_tokens(name), reason):
        print(line, flush=True)
    print(f"accepted; `stacklm run-flow lab {name}` resumes with the current code")


def verify(
    name: Name,
    trial: Annotated[
        str | None,
        typer.Argument(help="Prefix of the trial's identity, as in the report or records/; default: the cheapest judged trial."),
    ] = None,
) -> None:
    """Repeat one trial of an experiment and compare it with its record.

    Exits with 1 if the record is not reproduced.
    """
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
    """Return the files of an experiment, after creating its tokens if they are missing."""
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
