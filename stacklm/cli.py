"""The command line. Heavy modules are imported only by the commands that need them, so that `stacklm --help` is fast."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

import typer

from stacklm.cli_examples import add_examples
from stacklm.cli_lab import app as lab_app
from stacklm.cli_lab import verify
from stacklm.cli_models import benchmark, export_app, generate, load, register, serve
from stacklm.cli_start import doctor, init, leak
from stacklm.cli_try import EPILOG, try_
from stacklm.cli_types import Set, addresses, argument, experiments, flows, models, option, stages
from stacklm.config.schema import ParamsError, listed, nearest
from stacklm.files import read_json, write_text

if TYPE_CHECKING:
    from stacklm.config.model import Stacked
    from stacklm.config.params import Params
    from stacklm.pipeline.project import Project

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="The laboratory for stacked-parallel decoder language models: from raw text to a fair comparison with a dense twin.",
)

OneModel = Annotated[str | None, option("Model of params.yaml; default: all models.", models)]

app.add_typer(lab_app, name="lab")
app.add_typer(export_app, name="export")
app.command()(verify)
app.command()(doctor)
app.command()(init)
app.command("try", epilog=EPILOG)(try_)
app.command()(leak)
app.command()(register)
app.command()(load)
app.command()(generate)
app.command()(serve)
app.command()(benchmark)


@app.command("run-flow")
def run_flow(
    name: Annotated[
        str, argument("Flow: pretrain (all stages), download, tokenizer, shards, audit, evaluate, compare, or lab.", flows)
    ],
    experiment: Annotated[
        str | None, argument("Experiment for the flow lab: name of a file in experiments/, without .yaml.", experiments)
    ] = None,
    model: Annotated[list[str] | None, option("Run this model only, without the comparison; repeatable.", models)] = None,
    dask: Annotated[
        str | None, typer.Option(help="Run the trials of the flow lab on Dask: address of a scheduler, or `local`.")
    ] = None,
    set_: Set = None,
) -> None:
    """Run the pipeline or an experiment as a Prefect flow, as cached, parallel tasks shown in Prefect's UI."""
    from flows.run import run
    from stacklm.pipeline.project import check_tools

    check_tools(_project(set_))
    raise typer.Exit(run(name, model, experiment, dask))


@app.command()
def status(
    set_: Set = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing; exit with 1 if a stage is stale.")] = False,
) -> None:
    """Show which stages are stale, why, and whether they will run or be restored from the cache."""
    from stacklm.console import table
    from stacklm.pipeline.freshness import Pipeline
    from stacklm.pipeline.project import check_tools

    project = _project(set_)
    check_tools(project)
    outlooks = Pipeline(project).explain()
    stale = sum(bool(outlook.reasons) for outlook in outlooks.values())
    if quiet:
        raise typer.Exit(1 if stale else 0)
    words = {
        name: f"{outlook.verdict}{': ' if outlook.reasons else ''}{'; '.join(outlook.reasons)}"
        for name, outlook in outlooks.items()
    }
    print(table(["", ""], words.items(), left=2))
    if stale:
        print(f"\n{stale} of {len(outlooks)} stages are stale: `dvc repro` or `stacklm run-flow pretrain`")
    else:
        print("\nEverything is up to date.")


@app.command()
def accept(
    stages: Annotated[list[str], argument("Stages of all models or of one, such as pretrain or pretrain@dense.", addresses)],
    reason: Annotated[str, typer.Option(help="Why the change does not alter results; stored in the stage's record.")],
) -> None:
    """Keep a stage's outputs after a code change that does not alter its results, and record the reason."""
    from stacklm.pipeline.accept import accept
    from stacklm.pipeline.code import shortened
    from stacklm.pipeline.project import check_tools

    project = _project()
    check_tools(project)
    for address, changed in accept(project, stages, reason):
        print(f"{address}: up to date; accepted by hand: {shortened(changed)} changed")


@app.command()
def report() -> None:
    """Show the result of the last comparison again, with the path of its report."""
    from stacklm.report.tables import summary

    paths = _paths(_project(), "compare")
    if not paths["comparison"].exists():
        _fail("no models have been compared yet: run `dvc repro` or `stacklm run-flow pretrain`")
    print(summary(read_json(paths["comparison"]), paths["report"]))


@app.command()
def ui(
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port on 127.0.0.1.")] = 5000,
) -> None:
    """Browse all runs in MLflow's UI, served by one lightweight process on this machine only."""
    from stacklm.pipeline.tracking.sync import sync_all
    from stacklm.pipeline.tracking.ui import ui

    project = _project()
    sync_all(project)
    ui(project, port)


@app.command()
def sync() -> None:
    """Update MLflow from the published results, for instance after it was down or moved."""
    from stacklm.pipeline.tracking.store import shown_uri
    from stacklm.pipeline.tracking.sync import sync_all

    project = _project()
    if not sync_all(project):
        raise typer.Exit(1)
    print(f"up to date: {shown_uri(project)}")


@app.command()
def params(
    set_: Set = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema of params.yaml, for editors.")] = False,
) -> None:
    """Check params.yaml and print every setting, with its type, default and description."""
    from stacklm.config.describe import explained, json_schema
    from stacklm.config.params import load

    if schema:
        print(json.dumps(json_schema(), indent=2))
    else:
        print(explained(load(_project(set_).params_file)), end="")


@app.command()
def plan(
    model: OneModel = None,
    preset: Annotated[str | None, typer.Option(help="Plan a published model instead: seed-2x64 or seed-4x8.")] = None,
    memory: Annotated[str | None, typer.Option(help="Memory limit, such as 8GB; exits with 1 if training does not fit.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Override a setting for this plan without changing params.yaml; repeatable."
        ),
    ] = None,
    write: Annotated[
        bool,
        typer.Option("--write", help="Write the settings of --preset and --set, and those that make training fit, to params.yaml."),
    ] = False,
) -> None:
    """Estimate what training needs before it runs: parameters, FLOPs, batches, learning rate, disk and memory."""
    from stacklm.config.params import preview
    from stacklm.plan.plan import assignments_of
    from stacklm.plan.text import print_plan, size

    project = _project()
    assignments = [*(assignments_of(preset) if preset else []), *(set_ or [])]
    names = [preset] if preset else _chosen(preview(project.params_file, assignments), model)
    manifest = _paths(project, "shards")["shards"] / "manifest.json"
    fits = print_plan(project.params_file, assignments, names, manifest, size(memory) if memory else None, write)
    raise typer.Exit(0 if fits else 1)


@app.command()
def claims(
    write: Annotated[Path | None, typer.Option(help="Write a Markdown page to this file instead of printing.")] = None,
) -> None:
    """Compare the published claims about the first models with counts from this code and with experiments."""
    from stacklm.lab.claims import page
    from stacklm.pipeline.lab import claims_here

    found = claims_here(_project())
    if write:
        write_text(write, page(found))
    print(f"wrote {write}" if write else "\n\n".join(map(str, found)))


@app.command()
def audit(
    target: Annotated[
        str | None,
        typer.Argument(
            help="Model folder, Python file such as my_model.py or my_model.py:MyModel, or hf:PATH with a folder or a name on the "
            "Hugging Face hub (safetensors; none of its code is run). Default: the models of params.yaml."
        ),
    ] = None,
    model: OneModel = None,
    context_length: Annotated[int, typer.Option(min=2, help="Sequence length, for a Python file or hf:PATH.")] = 128,
    vocab_size: Annotated[int, typer.Option(min=2, help="Vocabulary size, for a Python file.")] = 512,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Override a setting of the Python file's class; repeatable."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the certificates; default: .stacklm/audits.")] = None,
) -> None:
    """Test that models cannot see the tokens that they predict, and write certificates.

    Exits with 1 if a test fails.
    """
    from stacklm.audit.audit import audit_model, audit_target, show
    from stacklm.config.params import load
    from stacklm.model.build import ModelConfig

    if target:
        found, name = audit_target(target, vocab_size, context_length, set_ or [])
        passed = [show(found, f"audit {target}", (out or Path(".stacklm/audits")) / f"{name}.json")]
    else:
        project = _project()
        params = load(project.params_file)
        passed = []
        for name in _chosen(params, model):
            config = ModelConfig(params.models[name].architecture, params.tokenizer.vocab_size, params.train.context_length)
            found = audit_model(config, params.train, _paths(project, "pretrain", name, params.seeds[0])["trained"])
            passed.append(show(found, f"audit {name}", (out or project.state / "audits") / f"{name}.json"))
    raise typer.Exit(0 if all(passed) else 1)


@app.command()
def variants(
    model: Annotated[str | None, option("Stacked model of params.yaml; default: the first.", models)] = None,
    preset: Annotated[str | None, typer.Option(help="Use a published model instead: seed-2x64 or seed-4x8.")] = None,
    axis: Annotated[
        Literal["parameters", "flops"], typer.Option(help="Quantity held equal in the grid of depth against parallel layers.")
    ] = "parameters",
) -> None:
    """List the variants of a stacked model, and trade-offs of depth for parallel layers, with their costs."""
    from stacklm.plan.text import variants_table

    print(variants_table(*_stacked(model, preset), axis))


@app.command()
def stage(
    name: Annotated[str, argument("Stage of dvc.yaml, such as shards.", stages)],
    model: Annotated[str | None, argument("Model, for stages that run once per model.", models)] = None,
    seed: Annotated[int | None, typer.Argument(help="Seed, for stages that run once per model and seed.")] = None,
) -> None:
    """Run one stage without checking whether it is stale. DVC calls this; use `dvc repro` instead."""
    from stacklm.pipeline import stages
    from stacklm.pipeline.runner import run_stage

    try:
        wanted = stages.stage(name)
    except KeyError as error:
        _fail(error.args[0])
    run_stage(_project(), stages.Instance(wanted, model, seed))


@app.command("dvc-yaml")
def dvc_yaml() -> None:
    """Regenerate dvc.yaml from the stage definitions, after changing what a stage reads, writes or imports."""
    from stacklm.pipeline.dvc import dvc_yaml

    path = _project().root / "dvc.yaml"
    write_text(path, dvc_yaml())
    print(f"wrote {path}")


add_examples(app)


def main() -> None:
    """Entry point of the command line: a user error is printed as one message, without a traceback."""
    from stacklm.data import DataError

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # print characters outside the console's encoding as escapes
    try:
        app()
    except (ParamsError, DataError) as error:
        _fail(str(error))
    except (OSError, RuntimeError, ValueError, MemoryError) as error:
        if os.environ.get("STACKLM_TRACEBACK"):
            raise
        _fail(f"{error}\n(set STACKLM_TRACEBACK=1 for a traceback)")


def _project(assignments: list[str] | None = None) -> Project:
    """Return the project of the current directory after applying `assignments` to params.yaml; its settings are checked."""
    from stacklm.config.params import load, set_values
    from stacklm.pipeline.project import Project

    project = Project.find()
    if assignments:
        set_values(project.params_file, assignments)
        print(f"params.yaml: set {', '.join(assignments)}")
    else:
        load(project.params_file)
    return project


def _chosen(params: Params, name: str | None) -> list[str]:
    """Return `name` if it is a model of params.yaml, or all models in their order for None. Raises `ParamsError`."""
    if name is None:
        return list(params.models)
    if name not in params.models:
        raise ParamsError(f"no model {name!r}; the models are {listed(params.models)}{nearest(name, params.models)}")
    return [name]


def _stacked(model: str | None, preset: str | None) -> tuple[Stacked, int, int]:
    """Return architecture, vocabulary size and context length of a preset or a stacked model, by default the first."""
    from stacklm.config.model import Stacked
    from stacklm.config.params import load
    from stacklm.model.build import PRESETS

    if preset:
        if preset not in PRESETS:
            _fail(f"no preset {preset!r}; choose one of {listed(PRESETS)}")
        found = [(PRESETS[preset].architecture, PRESETS[preset].vocab_size, PRESETS[preset].context_length)]
    else:
        params = load(_project().params_file)
        sizes = params.tokenizer.vocab_size, params.train.context_length
        found = [(params.models[name].architecture, *sizes) for name in _chosen(params, model)]
    for architecture, vocab_size, context in found:
        if isinstance(architecture, Stacked):
            return architecture, vocab_size, context
    _fail(f"{model or 'params.yaml'} is not a stacked model; choose one, such as --preset seed-2x64")


def _paths(project: Project, name: str, model: str | None = None, seed: int | None = None) -> dict[str, Path]:
    """Return the paths of a stage's outputs by name."""
    from stacklm.pipeline.stages import Instance, stage

    return Instance(stage(name), model, seed).paths(stage(name).writes, project.root)


def _fail(message: str) -> NoReturn:
    print(f"stacklm: {message}", file=sys.stderr)
    raise SystemExit(2)
