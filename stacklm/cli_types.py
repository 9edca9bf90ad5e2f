"""Arguments and options of the command line, with what a shell completes them to once `stacklm --install-completion` has been
run. Outside of a project that is nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from stacklm.pipeline.project import Project


def _completer(names: Callable[[Project], Iterable[str]]) -> Callable[[str], list[str]]:
    """Those names that begin as the user's word does; none where there is no project, or its settings cannot be read."""

    def complete(incomplete: str) -> list[str]:
        from ruamel.yaml import YAMLError

        from stacklm.config.schema import ParamsError
        from stacklm.pipeline.project import Project

        try:
            return [name for name in names(Project.find()) if name.startswith(incomplete)]
        except (ParamsError, OSError, YAMLError, KeyError, TypeError):
            return []

    return complete


def _settings(project: Project) -> dict[str, Any]:
    from ruamel.yaml import YAML

    return YAML(typ="safe").load(project.params_file)


def _runs(project: Project) -> list[str]:
    settings = _settings(project)
    return [*settings["models"], *(f"{model}-{seed}" for seed in settings["seeds"] for model in settings["models"])]


def _stages(project: Project) -> list[str]:
    from stacklm.pipeline.stages import STAGES

    return [stage.name for stage in STAGES]


def _addresses(project: Project) -> list[str]:
    from stacklm.pipeline.stages import STAGES

    models = _settings(project)["models"]
    return [*_stages(project), *(f"{stage.name}@{model}" for stage in STAGES if stage.per for model in models)]


def _experiments(project: Project) -> list[str]:
    from stacklm.pipeline.project import experiments

    return experiments(project)


experiments, models, runs = _completer(_experiments), _completer(lambda project: _settings(project)["models"]), _completer(_runs)
stages, addresses = _completer(_stages), _completer(_addresses)
flows = _completer(lambda project: [name for name in (*_stages(project), "lab") if name != "inputs"])


Cache = Literal["kv", "inputs"]
"""What a decoder keeps of a token."""
Axis = Literal["parameters", "flops"]
"""The budget that the trades between stacks and parallel layers hold equal."""


def _argument(help: str, names: Callable[[str], list[str]]) -> Any:
    return typer.Argument(help=help, autocompletion=names)


def _option(help: str, names: Callable[[str], list[str]]) -> Any:
    return typer.Option(help=help, autocompletion=names)


Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Change a value of params.yaml first, such as train.max_steps=200; repeatable."
    ),
]
Flow = Annotated[str, _argument("pretrain (everything); or download, tokenizer, shards, audit, evaluate, compare.", flows)]
FlowExperiment = Annotated[str | None, _argument("Of the flow lab: the name of a file in experiments/.", experiments)]
FlowModels = Annotated[list[str] | None, _option("Only this model, without the comparison; repeatable.", models)]
OneModel = Annotated[str | None, _option("One model of params.yaml; by default all.", models)]
StackedModel = Annotated[str | None, _option("A stacked model of params.yaml; by default the first.", models)]
TrainedModel = Annotated[
    str | None, _option("A trained model, such as dense, or dense-2 for its seed 2; by default the first.", runs)
]
FOLDER = "A trained model, such as dense-2, or the folder of one; by default the first of params.yaml."
BenchmarkedModel = Annotated[str | None, _argument(FOLDER, runs)]
Addresses = Annotated[list[str], _argument("Stages of one model or all, such as pretrain@dense or pretrain.", addresses)]
StageName = Annotated[str, _argument("A stage of dvc.yaml, such as shards.", stages)]
StageModel = Annotated[str | None, _argument("The model, for the stages that run once per model.", models)]
NAME = _argument("An experiment: the name of a file in experiments/, without .yaml.", experiments)
Name = Annotated[str, NAME]
TextExperiment = Annotated[str, _argument("An experiment on text.", experiments)]
ProbeExperiment = Annotated[str, _argument("An experiment on a synthetic task, with arms of the same names.", experiments)]
