"""What a shell may complete an argument to, once `stacklm --install-completion` has been run. Outside a project: nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stacklm.pipeline.project import Project


def _completer(names: Callable[[Project], Iterable[str]]) -> Callable[[str], list[str]]:
    """What begins as the user's word does; nothing where there is no project, or its settings cannot be read."""

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


def _models(project: Project) -> list[str]:
    return list(_settings(project)["models"])


def _runs(project: Project) -> list[str]:
    settings = _settings(project)
    return [*settings["models"], *(f"{model}-{seed}" for seed in settings["seeds"] for model in settings["models"])]


def _stages(project: Project) -> list[str]:
    from stacklm.pipeline.stages import STAGES

    return [stage.name for stage in STAGES]


def _addresses(project: Project) -> list[str]:
    from stacklm.pipeline.stages import STAGES

    return [*_stages(project), *(f"{stage.name}@{model}" for stage in STAGES if stage.per for model in _models(project))]


def _flows(project: Project) -> list[str]:
    return [*(name for name in _stages(project) if name != "inputs"), "lab"]


def _experiments(project: Project) -> list[str]:
    from stacklm.pipeline.project import experiments

    return experiments(project)


models, runs, stages = _completer(_models), _completer(_runs), _completer(_stages)
addresses, flows, experiments = _completer(_addresses), _completer(_flows), _completer(_experiments)
