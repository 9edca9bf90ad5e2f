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

export_app = typer.Typer(no_args_is_help=True, help="Export a trained model in another program's format.")
TrainedModel = Annotated[
    str | None, option("Trained model, such as dense, or dense-2 for seed 2; default: the first in params.yaml.", runs)
]
ModelName = Annotated[str, argument("Trained model, such as dense, or dense-2 for seed 2.", runs, metavar="MODEL")]
License = Annotated[str | None, typer.Option(help="License for the model card, such as apache-2.0; default: not stated.")]


def generate(
    prompt: Annotated[str | None, typer.Argument(help="Text to continue; default: standard input.")] = None,
    model: TrainedModel = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(help="Maximum number of new tokens. Sampling options default to `evaluate.sample` in params.yaml."),
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="Sampling temperature; 0 always picks the most likely token.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Sample from the k most likely tokens; 0 means all.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Sample from the smallest set of most likely tokens whose probabilities sum to at least p.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed for sampling.")] = None,
    cache: Annotated[
        Literal["kv", "inputs"], typer.Option(help="Cache keys and values (kv), or only the inputs of stacks (inputs).")
    ] = "kv",
) -> None:
    """Continue a prompt with a trained model, until the end of the document or --max-new-tokens."""
    from stacklm.evaluate.generate import continue_text

    evaluate, _, trained, tokenizer = find_trained(model)
    given = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    sample = plain(evaluate.sample) | {name: value for name, value in given.items() if value is not None}
    config = replace(evaluate, sample=read(type(evaluate.sample), sample, "generate"))
    text = sys.stdin.buffer.read() if prompt is None else os.fsencode(prompt)  # an argument may contain any bytes
    for piece in continue_text(config, trained, tokenizer, text, cache):
        print(piece, end="", flush=True)
    print()


def serve(
    model: TrainedModel = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 picks a free one.")] = 8000,
    host: Annotated[
        str, typer.Option(help="Address to listen on; any but a loopback address is reachable from other machines.")
    ] = "127.0.0.1",
    max_tokens: Annotated[int, typer.Option(min=1, help="Maximum number of tokens per completion.")] = 1024,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Seed for requests without one; default: a different one per request.")
    ] = None,
) -> None:
    """Serve a trained model on this machine: an OpenAI-compatible completions API and a web page."""
    from stacklm.serve.server import LOOPBACK, Engine, listen, serve

    evaluate, name, trained, tokenizer = find_trained(model)
    with listen(host, port) as listener:
        engine = Engine.open(name, evaluate, trained, tokenizer, max_tokens, seed)
        if host not in LOOPBACK:
            warning = f"{host} is not a loopback address: anyone who can reach it can use the model, without a key or encryption"
            print(f"stacklm: {warning}", file=sys.stderr)
        url = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
        body = f'{{"model": "{name}", "prompt": "def ", "max_tokens": 40}}'
        print(f"{name}: open {url} in a browser, or\n")
        print(f"  curl {url}/v1/completions -H 'Content-Type: application/json' -d '{body}'\n\n(stop with Ctrl-C)", flush=True)
        serve(listener, engine, LOOPBACK if host in LOOPBACK else ("*",))


def benchmark(
    model: Annotated[
        str | None, argument("Trained model, such as dense-2, or a model folder; default: the first in params.yaml.", runs)
    ] = None,
    blimp: Annotated[Path | None, typer.Option(help="BLiMP: JSON lines with sentence_good, sentence_bad and UID.")] = None,
    lambada: Annotated[Path | None, typer.Option(help="LAMBADA: JSON lines with text, whose last word is predicted.")] = None,
    wikitext: Annotated[Path | None, typer.Option(help="WikiText: a text file, such as wiki.test.raw.")] = None,
    multiple_choice: Annotated[
        list[Path] | None, typer.Option(help="Your own questions: JSON lines with context, choices and answer; repeatable.")
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="Maximum number of items per file, for BLiMP per set; default: all, or `limit` in params.yaml."),
    ] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="Tokenizer for a model folder; default: MODEL/../../tokenizer.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all figures as JSON, BLiMP also per set.")] = False,
) -> None:
    """Score a trained model on benchmarks in local files; default: `evaluate.benchmarks` in params.yaml."""
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
    os.chdir(project_root() or Path.cwd())  # paths in params.yaml are relative to the root
    scorer = Scorer.load(config, trained, words)
    figures = run_benchmarks(scorer, [replace(one, limit=limit or one.limit) for one in config.benchmarks])
    print(json.dumps(figures, indent=2) if as_json else benchmark_text({name: over_seeds([figures])}))


@export_app.command()
def hf(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="New or empty folder.")],
    name: ModelName,
    license: License = None,
) -> None:
    """Export a model to a folder that transformers loads without stacklm: weights, code, tokenizer, model card."""
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
    alias: Annotated[str, typer.Option(help="Alias to point to this model, such as production.")],
    license: License = None,
) -> None:
    """Register a trained model in MLflow under an alias, with its model card.

    It takes seconds. Training does not register models.
    """
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
        argument("Trained model, such as dense-2, an MLflow run ID, or models:/NAME@ALIAS.", runs, metavar="RUN_OR_ALIAS"),
    ],
) -> None:
    """Load a trained model, compare its weights, tokenizer, settings, data and code with its record, and describe it.

    In Python, `stacklm.load` returns model, tokenizer and config.
    """
    from stacklm.console import table
    from stacklm.pipeline.models import load

    loaded = load(target)
    print(table(["", ""], loaded.facts.items(), left=2))
    print()
    digests = {name: (loaded.found[name] or "")[:12] for name in loaded.verdicts}
    print(table(["SHA-256 of", "", ""], [(name, digests[name], verdict) for name, verdict in loaded.verdicts.items()], left=3))


def find_trained(model: str | None) -> tuple[Evaluate, str, Path, Path]:
    """Return settings, name, folder and tokenizer of a trained model; see `stacklm.pipeline.models.find`."""
    from stacklm.config.params import load
    from stacklm.pipeline.models import find, tokenizer_of
    from stacklm.pipeline.project import Project

    project = Project.find()
    found = find(project, model)
    return load(project.params_file).evaluate, found.item.run, found.trained, tokenizer_of(project)


def _find(model: str | None, tokenizer: Path | None) -> tuple[Evaluate, str, Path, Path]:
    """Return settings, name, folder and tokenizer of a model, given by its name in the project or by its folder."""
    from stacklm.config.evaluate import Evaluate
    from stacklm.config.params import PARAMS_FILE, load

    folder = Path(model or "")
    if not model or not folder.is_dir():
        return find_trained(model)
    root, folder = project_root(), folder.resolve()
    config = load(root / PARAMS_FILE).evaluate if root else Evaluate()
    return config, folder.name, folder, (tokenizer or folder.parents[1] / "tokenizer").resolve()
