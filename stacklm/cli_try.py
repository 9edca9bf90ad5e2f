"""`stacklm try`: test in minutes whether a model is better than a baseline, with a verdict for people and for scripts."""

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
EPILOG = "Exit codes: 0 better, 3 not worse, 4 worse, 5 no verdict, 2 error, 130 Ctrl-C."


def try_(
    target: Annotated[
        str,
        argument("Model of params.yaml, Python file such as my_model.py or my_model.py:MyModel, or YAML file.", models),
    ],
    baseline: Annotated[
        str | None, typer.Option(help="Model of params.yaml to compare with; default: the first dense one.")
    ] = None,
    budget: Annotated[
        Literal["parameters", "training_flops", "tokens", "seconds"],
        typer.Option(
            help="Quantity held equal. For parameters and training_flops the baseline is resized; your model is not changed."
        ),
    ] = "parameters",
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Override a setting of your model, such as settings.width=64, architecture.n_heads=8 or optimizer.peak_lr=1e-2, "
            "or of the training of both, such as train.max_steps=200; repeatable.",
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps per training run; default: train.max_steps.")] = None,
    looks: Annotated[str, typer.Option(help="Numbers of seeds after which a verdict is computed, declared before training.")] = (
        "3,5,8,12"
    ),
    margin: Annotated[float, typer.Option(help="Relative difference that is considered negligible.")] = 0.005,
    rates: Annotated[int, typer.Option(help="Number of learning rates in the tuning grid of each model.")] = 5,
    seeds: Annotated[int | None, typer.Option(help="Continue without asking until this many seeds.")] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Continue without asking until the last look.")] = False,
    name: Annotated[
        str | None, typer.Option(help="Name of the experiment, experiments/try-NAME.yaml; default: the model's name.")
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Start over; the earlier experiment is kept under another name.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print the result as JSON, and everything else to standard error.")] = False,
) -> None:
    """Test whether a model is better than a baseline: audit, tune and train both over seeds until the first verdict.

    After a look (an interim analysis) without a verdict, the command asks whether to continue; without a terminal or with
    --json it continues only with --seeds or --yes. The same command resumes.
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
        raise ParamsError(f"--looks {text!r}: write increasing numbers of seeds, 3 or more, separated by commas, such as 3,5,8,12")
    return found


def _look(seeds: int, looks: tuple[int, ...]) -> int:
    if seeds not in looks:
        raise ParamsError(
            f"--seeds {seeds}: verdicts are computed after {listed(looks)} seeds; choose one of these, or set --looks"
        )
    return seeds


def _go_on(gate: Gate, until: int, asks: bool) -> bool:
    """Return whether to train for the next look: up to `until` seeds if set; else, on a terminal and if `asks`, ask the user."""
    due = gate.next_look or 0
    if until or not (asks and sys.stdin.isatty() and sys.stdout.isatty()):
        return due <= until
    more, arms = due - gate.looks[gate.look - 1], gate.trainings(gate.look)
    print(f"\n{gate.sentence()}")
    print(f"Enter trains {more} more seeds (about {duration(gate.pace(arms))}), anything else stops: ", end="", flush=True)
    return sys.stdin.readline() == "\n"
