"""Arguments and options of the command line, with what a shell may complete them to."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from stacklm import cli_complete


class Cache(StrEnum):
    """What a decoder keeps of a token."""

    kv = "kv"
    inputs = "inputs"


class Axis(StrEnum):
    """The budget that the trades between stacks and parallel layers hold equal."""

    parameters = "parameters"
    flops = "flops"


Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Change a value of params.yaml first, such as train.max_steps=200; repeatable."
    ),
]
FLOWS = "pretrain (everything); or download, tokenizer, shards, audit, evaluate, compare."
Flow = Annotated[str, typer.Argument(help=FLOWS, autocompletion=cli_complete.flows)]
EXPERIMENT = "Of the flow lab: the name of a file in experiments/."
FlowExperiment = Annotated[str | None, typer.Argument(help=EXPERIMENT, autocompletion=cli_complete.experiments)]
MODELS = "Only this model, without the comparison; repeatable."
FlowModels = Annotated[list[str] | None, typer.Option(help=MODELS, autocompletion=cli_complete.models)]
ONE = "One model of params.yaml; by default all."
OneModel = Annotated[str | None, typer.Option(help=ONE, autocompletion=cli_complete.models)]
STACKED = "A stacked model of params.yaml; by default the first."
StackedModel = Annotated[str | None, typer.Option(help=STACKED, autocompletion=cli_complete.models)]
RUN = "A trained model, such as dense, or dense-2 for its seed 2; by default the first."
TrainedModel = Annotated[str | None, typer.Option(help=RUN, autocompletion=cli_complete.runs)]
FOLDER = "A trained model, such as dense-2, or the folder of one; by default the first of params.yaml."
BenchmarkedModel = Annotated[str | None, typer.Argument(help=FOLDER, autocompletion=cli_complete.runs)]
ADDRESSES = "Stages of one model or all, such as pretrain@dense or pretrain."
Addresses = Annotated[list[str], typer.Argument(help=ADDRESSES, autocompletion=cli_complete.addresses)]
STAGE = "A stage of dvc.yaml, such as shards."
StageName = Annotated[str, typer.Argument(help=STAGE, autocompletion=cli_complete.stages)]
STAGE_MODEL = "The model, for the stages that run once per model."
StageModel = Annotated[str | None, typer.Argument(help=STAGE_MODEL, autocompletion=cli_complete.models)]
NAME = typer.Argument(
    help="An experiment: the name of a file in experiments/, without .yaml.", autocompletion=cli_complete.experiments
)
Name = Annotated[str, NAME]
