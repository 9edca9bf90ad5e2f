"""Trained models for other programs: `stacklm export hf`, `stacklm register` and `stacklm load`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stacklm.cli_types import runs

app = typer.Typer(no_args_is_help=True, help="Write a trained model in the form of another program.")
NAME = "A trained model, such as dense, or dense-2 for its seed 2."
Name = Annotated[str, typer.Argument(metavar="MODEL", help=NAME, autocompletion=runs)]
License = Annotated[str | None, typer.Option(help="Of the model, for its card, such as apache-2.0; by default not stated.")]


@app.command()
def hf(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new or empty folder.")],
    name: Name,
    license: License = None,
) -> None:
    """Write a folder that transformers loads, also where stacklm is not installed: weights, code, tokenizer, model card."""
    from stacklm.config.schema import ParamsError
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
    name: Name,
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
        typer.Argument(
            metavar="RUN_OR_ALIAS",
            help="A trained model such as dense-2, the id of a run in MLflow, or models:/NAME@ALIAS.",
            autocompletion=runs,
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
