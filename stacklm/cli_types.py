"""Arguments and options with shell completion, after `stacklm --install-completion`. Outside a project nothing is completed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from stacklm.pipeline.project import Project

Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Set a value in params.yaml first, such as train.max_steps=200; repeatable."),
]


def argument(help: str, names: Callable[[str], list[str]], **options: Any) -> Any:
    return typer.Argument(help=help, autocompletion=names, **options)


def option(help: str, names: Callable[[str], list[str]]) -> Any:
    return typer.Option(help=help, autocompletion=names)


def _completer(names: Callable[[Project], Iterable[str]]) -> Callable[[str], list[str]]:
    """Return a completer of the names with the typed prefix; it returns none outside a project or if settings cannot be read."""

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


def _stages() -> list[str]:
    from stacklm.pipeline.stages import STAGES

    return [stage.name for stage in STAGES]


@_completer
def experiments(project: Project) -> Iterable[str]:
    from stacklm.pipeline.project import experiments

    return experiments(project)


@_completer
def models(project: Project) -> Iterable[str]:
    return _settings(project)["models"]


@_completer
def runs(project: Project) -> Iterable[str]:
    settings = _settings(project)
    return [*settings["models"], *(f"{model}-{seed}" for seed in settings["seeds"] for model in settings["models"])]


@_completer
def stages(project: Project) -> Iterable[str]:
    return _stages()


@_completer
def addresses(project: Project) -> Iterable[str]:
    from stacklm.pipeline.stages import STAGES

    models = _settings(project)["models"]
    return [*_stages(), *(f"{stage.name}@{model}" for stage in STAGES if stage.per for model in models)]


@_completer
def flows(project: Project) -> Iterable[str]:
    return [name for name in (*_stages(), "lab") if name != "inputs"]
