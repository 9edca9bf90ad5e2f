"""Commands for trained models: `stacklm generate`, `serve` and `benchmark`, and `export hf`, `register` and `load`."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from stacklm.cli_types import argument, option, runs
from stacklm.config.schema import ParamsError, plain, read
from stacklm.files import project_root

if TYPE_CHECKING:
    from stacklm.config.evaluate import Evaluate

export_app = typer.Typer(no_args_is_help=True, help="Write a trained model in the form of another program.")
TrainedModel = Annotated[
    str | None, option("A trained model, such as dense, or dense-2 for its seed 2; by default the first.", runs)
]
ModelName = Annotated[str, argument("A trained model, such as dense, or dense-2 for its seed 2.", runs, metavar="MODEL")]
License = Annotated[str | None, typer.Option(help="Of the model, for its card, such as apache-2.0; by default not stated.")]


def generate(
    prompt: Annotated[str | None, typer.Argument(help="The text to continue; without it, standard input is read.")] = None,
    model: TrainedModel = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens at most. All options default to `evaluate.sample` of params.yaml."),
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="0: always the most likely token.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Sample from the k most likely tokens; 0: from all.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample from the most likely tokens whose probabilities add up to p.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the sampling.")] = None,
    cache: Annotated[Literal["kv", "inputs"], typer.Option(help="Keep keys and values, or the inputs of stacks alone.")] = "kv",
) -> None:
    """Continue a prompt with a trained model, up to the end of the document or `--max-new-tokens`."""
    from stacklm.evaluate.generate import continue_text

    evaluate, _, trained, tokenizer = find_trained(model)
    given = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    sample = plain(evaluate.sample) | {name: value for name, value in given.items() if value is not None}
    config = replace(evaluate, sample=read(type(evaluate.sample), sample, "generate"))
    text = sys.stdin.buffer.read() if prompt is None else os.fsencode(prompt)  # an argument may hold any bytes
    for piece in continue_text(config, trained, tokenizer, text, cache):
        print(piece, end="", flush=True)
    print()


def serve(
    model: TrainedModel = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port; 0: a free one.")] = 8000,
    host: Annotated[
        str, typer.Option(help="The address to listen at; others than this machine's own let others in.")
    ] = "127.0.0.1",
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a completion, at most.")] = 1024,
    seed: Annotated[int | None, typer.Option(min=0, help="Of requests that give none; by default another one for each.")] = None,
) -> None:
    """Serve a trained model on this machine: the completions part of the OpenAI API, and a page to type into."""
    from stacklm.serve.server import LOOPBACK, Engine, listen, serve

    evaluate, name, trained, tokenizer = find_trained(model)
    with listen(host, port) as listener:
        engine = Engine.open(name, evaluate, trained, tokenizer, max_tokens, seed)
        if host not in LOOPBACK:
            warning = f"{host} is not this machine alone: whoever reaches it can use the model, without a key or encryption"
            print(f"stacklm: {warning}", file=sys.stderr)
        url = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
        body = f'{{"model": "{name}", "prompt": "def ", "max_tokens": 40}}'
        print(f"{name}: open {url} in a browser, or\n")
        print(f"  curl {url}/v1/completions -H 'Content-Type: application/json' -d '{body}'\n\n(stop with Ctrl-C)", flush=True)
        serve(listener, engine, LOOPBACK if host in LOOPBACK else ("*",))


def benchmark(
    model: Annotated[
        str | None, argument("A trained model, such as dense-2, or the folder of one; by default the first of params.yaml.", runs)
    ] = None,
    blimp: Annotated[Path | None, typer.Option(help="JSON lines with sentence_good, sentence_bad and UID.")] = None,
    lambada: Annotated[Path | None, typer.Option(help="JSON lines with text, of which the last word is to be said.")] = None,
    wikitext: Annotated[Path | None, typer.Option(help="A file of WikiText, such as wiki.test.raw.")] = None,
    multiple_choice: Annotated[
        list[Path] | None, typer.Option(help="JSON lines with context, choices and answer; repeatable.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Items at most, of blimp of each set. By default all.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="Of a model's folder; by default the folder tokenizer two above.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all figures, sets of blimp included, as JSON.")] = False,
) -> None:
    """Score a trained model on benchmarks in local files, by default on those of `evaluate.benchmarks` in params.yaml."""
    from stacklm.config.evaluate import Benchmark
    from stacklm.evaluate.benchmarks import Scorer, run_benchmarks
    from stacklm.report.benchmarks import over_seeds
    from stacklm.report.tables import benchmark_text

    one_each = {"blimp": blimp, "lambada": lambada, "wikitext": wikitext}
    files: list[dict[str, Any]] = [{"kind": kind, "path": str(path.resolve())} for kind, path in one_each.items() if path]
    for path in multiple_choice or []:
        files.append({"kind": "multiple_choice", "path": str(path.resolve()), "name": path.name.split(".")[0]})
    config, name, trained, words = _find(model, tokenizer)
    if files:
        config = replace(config, benchmarks=tuple(read(Benchmark, one, "benchmark") for one in files))
    if not config.benchmarks:
        raise ParamsError("no benchmark: name a file, such as --blimp blimp.jsonl, or list some in evaluate.benchmarks")
    os.chdir(project_root() or Path.cwd())  # from where paths in params.yaml start
    scorer = Scorer.load(config, trained, words)
    figures = run_benchmarks(scorer, [replace(one, limit=limit or one.limit) for one in config.benchmarks])
    print(json.dumps(figures, indent=2) if as_json else benchmark_text({name: over_seeds([figures])}))


@export_app.command()
def hf(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new or empty folder.")],
    name: ModelName,
    license: License = None,
) -> None:
    """Write a folder that transformers loads, also where stacklm is not installed: weights, code, tokenizer, model card."""
    from stacklm.pipeline.models import export
    from stacklm.pipeline.project import Project

    try:
        export(Project.find(), folder, name, license)
    except ImportError as error:
        if error.name != "transformers":
            raise
        raise ParamsError("needs transformers: `pip install 'stacklm[huggingface]'`") from None
    code = ", trust_remote_code=True" if any(folder.glob("*.py")) else ""
    print(f"wrote {folder}: AutoModelForCausalLM.from_pretrained({str(folder)!r}{code})")


def register(
    name: ModelName,
    alias: Annotated[str, typer.Option(help="The alias that moves to this model, such as production.")],
    license: License = None,
) -> None:
    """Register a trained model in MLflow under an alias, with its model card. It takes seconds; training does not do it."""
    from stacklm.pipeline.models import register
    from stacklm.pipeline.project import Project
    from stacklm.pipeline.tracking.store import tracking_uri

    project = Project.find()
    address = register(project, name, alias, license)
    print(f"registered {name} as {address}; to serve it:")
    print(f"MLFLOW_TRACKING_URI={tracking_uri(project)} mlflow models serve -m {address} --env-manager local")


def load(
    target: Annotated[
        str,
        argument(
            "A trained model such as dense-2, the id of a run in MLflow, or models:/NAME@ALIAS.", runs, metavar="RUN_OR_ALIAS"
        ),
    ],
) -> None:
    """Load a trained model, compare weights, tokenizer, settings, data and code with what is on record, and say what it is.

    In Python, `stacklm.load` gives model, tokenizer and config.
    """
    from stacklm.console import table
    from stacklm.pipeline.models import load

    loaded = load(target)
    print(table(["", ""], loaded.facts.items(), left=2))
    print()
    digests = {name: (loaded.found[name] or "")[:12] for name in loaded.verdicts}
    print(table(["SHA-256 of", "", ""], [(name, digests[name], verdict) for name, verdict in loaded.verdicts.items()], left=3))


def find_trained(model: str | None) -> tuple[Evaluate, str, Path, Path]:
    """Settings, name, folder and tokenizer of a trained model; see `stacklm.pipeline.models.find`."""
    from stacklm.config.params import load
    from stacklm.pipeline.models import find, tokenizer_of
    from stacklm.pipeline.project import Project

    project = Project.find()
    found = find(project, model)
    return load(project.params_file).evaluate, found.item.run, found.trained, tokenizer_of(project)


def _find(model: str | None, tokenizer: Path | None) -> tuple[Evaluate, str, Path, Path]:
    """Settings, name, folder and tokenizer of a model by its name in the project, or by its folder."""
    from stacklm.config.evaluate import Evaluate
    from stacklm.config.params import PARAMS_FILE, load

    folder = Path(model or "")
    if not model or not folder.is_dir():
        return find_trained(model)
    root, folder = project_root(), folder.resolve()
    config = load(root / PARAMS_FILE).evaluate if root else Evaluate()
    return config, folder.name, folder, (tokenizer or folder.parents[1] / "tokenizer").resolve()
