"""`stacklm generate` and `stacklm serve`: text from a trained model."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stacklm.cli_types import Cache, TrainedModel

if TYPE_CHECKING:
    from stacklm.config.evaluate import Evaluate


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
    cache: Annotated[Cache, typer.Option(help="Keep keys and values, or the inputs of stacks alone.")] = "kv",
) -> None:
    """Continue a prompt with a trained model, up to the end of the document or `--max-new-tokens`."""
    from dataclasses import replace

    from stacklm.config.schema import plain, read
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


def find_trained(model: str | None) -> tuple[Evaluate, str, Path, Path]:
    """Settings, name, folder and tokenizer of a trained model; see `stacklm.pipeline.models.find`."""
    from stacklm.config.params import load
    from stacklm.pipeline.models import find, tokenizer_of
    from stacklm.pipeline.project import Project

    project = Project.find()
    found = find(project, model)
    return load(project.params_file).evaluate, found.item.run, found.trained, tokenizer_of(project)
