"""The command line. Nothing heavy is imported before a command needs it: `stacklm --help` answers at once."""

from __future__ import annotations

import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="The laboratory for stacked-parallel decoder language models: from raw text to an honest comparison.",
)

Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a value of params.yaml first, such as train.steps=200; repeatable."),
]


class Cache(StrEnum):
    """What a decoder keeps of a token."""

    kv = "kv"
    x = "x"


class Axis(StrEnum):
    """What members of a family have in common."""

    parameters = "parameters"
    flops = "flops"


@app.command("run-flow")
def run_flow(
    name: Annotated[str, typer.Argument(help="pretrain (everything); or download, tokenizer, shards, audit, evaluate, compare.")],
    set_: Set = None,
) -> None:
    """Run the pipeline as a Prefect flow: models side by side, cached tasks, seen in Prefect's UI."""
    from flows.run import run

    _project(set_)
    raise typer.Exit(run(name))


@app.command()
def status(set_: Set = None) -> None:
    """Say which stages are stale, and why."""
    from stacklm.pipeline.freshness import Pipeline

    reasons = Pipeline(_project(set_)).explain()
    width = max(map(len, reasons))
    for address, why in reasons.items():
        print(f"{address:<{width}}  {'stale: ' + '; '.join(why) if why else 'up to date'}")
    stale = sum(map(bool, reasons.values()))
    if stale:
        print(f"\n{stale} of {len(reasons)} stages to run: `dvc repro` or `stacklm run-flow pretrain`")
    else:
        print("\nEverything is up to date.")


@app.command()
def report() -> None:
    """Show again what the last comparison found, and where its page is."""
    from stacklm.files import read_json
    from stacklm.report.summary import summary

    paths = _paths(_project(), "compare")
    if not paths["comparison"].exists():
        _fail("nothing has been compared yet: `dvc repro` or `stacklm run-flow pretrain` makes the report")
    print(summary(read_json(paths["comparison"]), paths["report"]))


@app.command()
def ui(port: Annotated[int, typer.Option(help="The port on this machine (127.0.0.1).")] = 5000) -> None:
    """Browse the experiments: MLflow's pages, in one light process, on this machine only."""
    from stacklm.pipeline.tracking.sync import sync_all
    from stacklm.pipeline.tracking.ui import ui

    project = _project()
    sync_all(project)
    ui(project, port)


@app.command()
def sync() -> None:
    """Bring MLflow up to date with the published results, after it was down or moved."""
    from stacklm.pipeline.tracking.sync import sync_all
    from stacklm.pipeline.tracking.tracker import tracking_uri

    project = _project()
    if not sync_all(project):
        raise typer.Exit(1)
    print(f"up to date: {tracking_uri(project)}")


@app.command()
def params(set_: Set = None) -> None:
    """Check params.yaml and print it in full, every default filled in."""
    from ruamel.yaml import YAML

    from stacklm.config.params import load
    from stacklm.config.schema import plain

    YAML().dump(plain(load(_project(set_).params_file)), sys.stdout)


@app.command()
def plan(
    model: Annotated[str | None, typer.Option(help="One model of params.yaml; by default all.")] = None,
    preset: Annotated[str | None, typer.Option(help="A published model in their place: seed-2x64 or seed-4x8.")] = None,
    memory: Annotated[str | None, typer.Option(help="What it must fit, such as 8GB; the exit code is 1 if it does not.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="What if: params.yaml stays as it is; repeatable.")
    ] = None,
    write: Annotated[bool, typer.Option("--write", help="Write --preset, --set and what makes it fit into params.yaml.")] = False,
) -> None:
    """Say what training would take before it runs: parameters, operations, batches, learning rate, disk and memory."""
    from stacklm.config.params import preview
    from stacklm.plan.plan import assignments_of
    from stacklm.plan.run import run
    from stacklm.plan.text import size

    project = _project()
    assignments = [*(assignments_of(preset) if preset else []), *(set_ or [])]
    names = [preset] if preset else _chosen(preview(project.params_file, assignments), model)
    manifest = _paths(project, "shards")["shards"] / "manifest.json"
    fits = run(project.params_file, assignments, names, manifest, size(memory) if memory else None, write)
    raise typer.Exit(0 if fits else 1)


@app.command("lr-find")
def lr_find(
    model: Annotated[str | None, typer.Option(help="One model of params.yaml; by default all.")] = None,
    low: Annotated[float, typer.Option(help="The learning rate to begin with.")] = 1e-5,
    high: Annotated[float, typer.Option(help="The learning rate to end with, if the loss does not rise before.")] = 1.0,
    steps: Annotated[int, typer.Option(help="Updates from one to the other.")] = 100,
    write: Annotated[bool, typer.Option("--write", help="Put the suggestions into params.yaml.")] = False,
) -> None:
    """Suggest a peak learning rate: train with a rising one until the loss rises, and plot it (.stacklm/lr-find)."""
    from stacklm.config.params import load, set_values

    project = _project()
    params = load(project.params_file)
    names = _chosen(params, model)
    shards, folder = _paths(project, "shards")["shards"], project.state / "lr-find"
    if not shards.exists():
        _fail("there are no tokens to train on yet: `dvc repro shards` makes them")
    from stacklm.report.lr_find import describe, record
    from stacklm.train.lr_find import lr_find, peak_lrs

    changes = []
    for name in names:
        entry = params.models[name]
        test = lr_find(f"lr-find {name}", params.train, entry, shards, low, high, steps)
        record(test, params.train, entry, folder, name)
        print(describe(test, params.train, entry, name) + f"\nplot and data: {folder / name}.png, .json\n", flush=True)
        if not test.caveat:
            rates = peak_lrs(entry.optimizer, test.suggestion)
            changes += [f"models.{name}.optimizer.{key}={lr}" for key, lr in rates.items()]
    if write and changes:
        set_values(project.params_file, changes)
        print(f"params.yaml: set {', '.join(changes)}")
    elif changes:
        print("The same command with --write puts this into params.yaml.")


@app.command()
def claims() -> None:
    """Put what was published about the first models beside what this code counts."""
    from stacklm.plan.claims import table

    print(table())


@app.command()
def audit(
    folder: Annotated[Path | None, typer.Argument(help="A model's folder; left out, the models of params.yaml.")] = None,
    model: Annotated[str | None, typer.Option(help="One model of params.yaml.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the certificates; by default .stacklm/audits.")] = None,
) -> None:
    """Prove that models see no token that they are to predict, and write certificates. The exit code is 1 where that fails."""
    from stacklm.audit.audit import audit_folder, audit_model, show
    from stacklm.config.params import load
    from stacklm.model.build import ModelConfig

    if folder:
        passed = [show(audit_folder(folder), f"audit {folder}", (out or Path(".stacklm/audits")) / f"{folder.resolve().name}.json")]
    else:
        project = _project()
        params = load(project.params_file)
        passed = []
        for name in _chosen(params, model):
            config = ModelConfig(params.models[name].architecture, params.tokenizer.vocab_size, params.train.context)
            found = audit_model(config, _paths(project, "pretrain", name)["trained"])
            passed.append(show(found, f"audit {name}", (out or project.state / "audits") / f"{name}.json"))
    raise typer.Exit(0 if all(passed) else 1)


@app.command()
def family(
    model: Annotated[str | None, typer.Option(help="A stacked model of params.yaml; by default the first.")] = None,
    preset: Annotated[str | None, typer.Option(help="A published model instead: seed-2x64 or seed-4x8.")] = None,
    axis: Annotated[Axis, typer.Option(help="What the grid of depth against parallel layers holds equal.")] = "parameters",
) -> None:
    """List the variants of a stacked model and the trades of depth for parallel layers, with what each has and costs."""
    from stacklm.report.family import family

    config = _stacked(model, preset)
    print(family(config.architecture, config.vocab_size, config.context, axis.value))


@app.command()
def generate(
    prompt: Annotated[str | None, typer.Argument(help="The text to go on from; left out, it is read from standard input.")] = None,
    model: Annotated[str | None, typer.Option(help="A trained model; by default the first of params.yaml.")] = None,
    tokens: Annotated[
        int | None, typer.Option(help="At most so many; these defaults are `evaluate.sample` of params.yaml.")
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="0 takes the likeliest token each time.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw from the so many likeliest tokens; 0: from all.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from the fewest likeliest whose probabilities reach it.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the draws.")] = None,
    cache: Annotated[Cache, typer.Option(help="Keep keys and values, or the inputs of stacks alone.")] = "kv",
) -> None:
    """Let a trained model go on from a prompt, character by character, up to the end of the document."""
    from dataclasses import replace

    from stacklm.config.params import load
    from stacklm.config.schema import plain, read
    from stacklm.evaluate.text import continue_text

    project = _project()
    params = load(project.params_file)
    given = {"tokens": tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    sample = plain(params.evaluate.sample) | {name: value for name, value in given.items() if value is not None}
    config = replace(params.evaluate, sample=read(type(params.evaluate.sample), sample, "generate"))
    name = _chosen(params, model)[0]
    paths = _paths(project, "pretrain", name) | _paths(project, "tokenizer")
    if not paths["trained"].exists():
        _fail(f"{name} is not trained yet: `dvc repro pretrain@{name}` or `stacklm run-flow pretrain` does it")
    text = sys.stdin.buffer.read() if prompt is None else prompt
    for piece in continue_text(config, paths["trained"], paths["tokenizer"], text, cache.value):
        print(piece, end="", flush=True)
    print()


@app.command()
def stage(
    name: Annotated[str, typer.Argument(help="A stage of dvc.yaml, such as shards.")],
    model: Annotated[str | None, typer.Argument(help="The model, for the stages that run once per model.")] = None,
) -> None:
    """Run one stage, without asking whether it is needed. DVC calls this; you want `dvc repro`."""
    from stacklm.pipeline import stages
    from stacklm.pipeline.leaf import run_stage

    try:
        wanted = stages.stage(name)
    except KeyError as error:
        _fail(error.args[0])
    run_stage(_project(), wanted, model)


@app.command("dvc-yaml")
def dvc_yaml() -> None:
    """Write dvc.yaml anew from the table of stages (after a change of what a stage reads, writes or imports)."""
    from stacklm.files import write_text
    from stacklm.pipeline.dvc import dvc_yaml

    path = _project().root / "dvc.yaml"
    write_text(path, dvc_yaml())
    print(f"wrote {path}")


def main() -> None:
    """The entry point: an error that the user can mend is one clear message, not a traceback."""
    from stacklm.config.schema import ParamsError
    from stacklm.data import DataError

    try:
        app()
    except (ParamsError, DataError) as error:
        _fail(str(error))
    except (OSError, RuntimeError, ValueError, MemoryError) as error:
        if os.environ.get("STACKLM_TRACEBACK"):
            raise
        _fail(f"{error}\n(STACKLM_TRACEBACK=1 shows where)")


def _project(assignments: list[str] | None = None):
    """The project around the current directory, with checked settings, changed as asked for."""
    from stacklm.config.params import load, set_values
    from stacklm.pipeline.project import Project

    project = Project.find()
    if assignments:
        set_values(project.params_file, assignments)
        print(f"params.yaml: set {', '.join(assignments)}")
    else:
        load(project.params_file)
    return project


def _chosen(params, name: str | None) -> list[str]:
    """The model of that name, or all in their order."""
    from stacklm.config.schema import ParamsError, listed, nearest

    if name is None:
        return list(params.models)
    if name not in params.models:
        raise ParamsError(f"no model {name!r}; the models are {listed(params.models)}{nearest(name, params.models)}")
    return [name]


def _stacked(model: str | None, preset: str | None):
    """The stacked model of that name in params.yaml, by default the first; or the preset of that name."""
    from stacklm.config.model import Stacked
    from stacklm.config.params import load
    from stacklm.config.schema import listed
    from stacklm.model.build import ModelConfig
    from stacklm.model.presets import PRESETS

    if preset:
        if preset not in PRESETS:
            _fail(f"no preset {preset!r}; choose one of {listed(PRESETS)}")
        return PRESETS[preset]
    params = load(_project().params_file)
    for name in _chosen(params, model):
        if isinstance(params.models[name].architecture, Stacked):
            return ModelConfig(params.models[name].architecture, params.tokenizer.vocab_size, params.train.context)
    _fail(f"{model or 'params.yaml'} is no stacked model; a family is made around one, such as --preset seed-2x64")


def _paths(project, name: str, model: str | None = None) -> dict:
    """Where a stage's outputs are."""
    from stacklm.pipeline.stages import stage

    return stage(name).paths(stage(name).writes, project.root, model)


def _fail(message: str) -> None:
    print(f"stacklm: {message}", file=sys.stderr)
    raise SystemExit(2)
