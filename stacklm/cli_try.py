"""`stacklm try`: is a model better than the baseline? A verdict with an interval in minutes, for people and for scripts."""

from __future__ import annotations

import contextlib
import json
import sys
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from stacklm.cli_types import argument, models
from stacklm.config.schema import ParamsError, listed
from stacklm.units import duration

if TYPE_CHECKING:
    from stacklm.lab.gate import Gate

PREFIX = "try-"
EPILOG = "The exit code is 0 for better, 3 for not worse, 4 for worse, 5 for no verdict, 2 for an error, and 130 after Ctrl-C."


def try_(
    target: Annotated[
        str, argument("A model of params.yaml, a file my_model.py or my_model.py:Class, or a YAML file with a model.", models)
    ],
    baseline: Annotated[
        str | None, typer.Option(help="The model of params.yaml to compare with; by default the first dense one.")
    ] = None,
    budget: Annotated[
        Literal["parameters", "training_flops", "tokens", "seconds"],
        typer.Option(help="What is held equal. The baseline is given the widths for it; your model stays as it is."),
    ] = "parameters",
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Change your model, as settings.width=64, architecture.n_heads=8 or optimizer.peak_lr=1e-2, or the training of "
            "both, as train.max_steps=200; repeatable.",
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of each training; by default train.max_steps.")] = None,
    looks: Annotated[str, typer.Option(help="Seeds after which the verdict is asked for; declared before any is trained.")] = (
        "3,5,8,12"
    ),
    margin: Annotated[float, typer.Option(help="The relative difference that does not matter.")] = 0.005,
    rates: Annotated[int, typer.Option(help="Learning rates that each model is tuned over.")] = 5,
    seeds: Annotated[int | None, typer.Option(help="Go on without asking to the look at this many seeds.")] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Go on without asking, to the last look.")] = False,
    name: Annotated[str | None, typer.Option(help="Of the experiment, experiments/try-NAME.yaml; by default the model's.")] = None,
    again: Annotated[bool, typer.Option("--again", help="Begin again; what is there is kept under another name.")] = False,
    json_: Annotated[
        bool, typer.Option("--json", help="The result as JSON on standard output, all else on standard error.")
    ] = False,
) -> None:
    """Is a model better than the baseline? Audits it, tunes and trains both over seeds, and stops at the first verdict.

    After each look without one it asks whether to go on; not on a terminal, it goes on with --seeds or --yes alone. The
    same command resumes.
    """
    from stacklm.config.params import load
    from stacklm.lab.gate import EXIT_CODES, changed, find_baseline, find_candidate, gate_experiment, of_steps
    from stacklm.pipeline.gate import audited, open_gate, planned, result, run_looks
    from stacklm.pipeline.lab import bring_tokens
    from stacklm.pipeline.locks import hold_project
    from stacklm.pipeline.project import Project

    try:
        with contextlib.redirect_stdout(sys.stderr) if json_ else contextlib.nullcontext():
            project = Project.find()
            params = load(project.params_file)
            theirs = find_baseline(baseline, params)
            ours, train = changed(find_candidate(target, params, theirs.model.optimizer), set_ or [])
            train, all_looks = (of_steps(steps, params.train) if steps else {}) | train, _numbers(looks)
            made = gate_experiment(ours, theirs, params, budget, margin, rates, all_looks, train or None)
            until = all_looks[-1] if yes else _look(seeds, all_looks) if seeds else 0
            bring_tokens(project)
            with hold_project(project, f"try {ours.name}", wait=True):
                files, lab = open_gate(project, f"{PREFIX}{name or ours.name}", made, again)
                print(f"{audited(files, lab)}\n", flush=True)
                pace, text = planned(files, lab)
                print(f"{text}\n", flush=True)
                found = run_looks(files, lab, pace, lambda gate: _go_on(gate, until, asks=not json_))
                answer = result(files, found)
            if answer["attempt"] > 1:
                print(f"\nattempt {answer['attempt']} of {files.name}: the error rate is that of each, not of the best of them")
            print(f"\n{answer['sentence']}\n\nread the report: {answer['report']}")
    except KeyboardInterrupt:
        print("\nstacklm: interrupted; the same command resumes", file=sys.stderr)
        raise typer.Exit(130) from None
    if json_:
        print(json.dumps(answer))
    raise typer.Exit(EXIT_CODES[found.outcome])


def _numbers(text: str) -> tuple[int, ...]:
    found = tuple(int(word) for word in text.split(",") if word.strip().isdecimal())
    if len(found) != len(text.split(",")) or found[0] < 3 or list(found) != sorted({*found}):
        raise ParamsError(f"--looks {text!r}: write growing numbers of seeds, from 3 on, with commas, such as 3,5,8,12")
    return found


def _look(seeds: int, looks: tuple[int, ...]) -> int:
    if seeds not in looks:
        raise ParamsError(f"--seeds {seeds}: the verdict is asked for after {listed(looks)} seeds; choose one of these, or --looks")
    return seeds


def _go_on(gate: Gate, until: int, asks: bool) -> bool:
    """Whether to train for the next look: as far as `until` seeds; on a terminal, where one `asks`, by the user's word."""
    due = gate.next_look or 0
    if until or not (asks and sys.stdin.isatty() and sys.stdout.isatty()):
        return due <= until
    more, arms = due - gate.looks[gate.look - 1], gate.trainings(gate.look)
    print(f"\n{gate.sentence()}")
    print(f"Enter trains {more} more seeds, about {duration(gate.pace(arms))}; anything else stops here: ", end="", flush=True)
    return sys.stdin.readline() == "\n"
