"""Trained models for other programs: `stacklm export hf`."""

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
    print(f"wrote {folder}: AutoModelForCausalLM.from_pretrained({str(folder)!r}, trust_remote_code=True)")
