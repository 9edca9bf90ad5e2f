"""What is up to date, and why the rest is not: asked of DVC, the one authority, in this process."""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from typing import Any

from stacklm.config.params import load
from stacklm.pipeline.project import Project
from stacklm.pipeline.stages import Stage, instances, upstream

LOCK_FILE = "dvc.lock"


class Pipeline:
    """DVC's view of a project. Opening it takes about a second, a question some hundredths."""

    def __init__(self, project: Project) -> None:
        from dvc.repo import Repo

        logging.getLogger("dvc").setLevel(logging.ERROR)
        self._project = project
        self._guard = threading.Lock()  # DVC's objects are not made for several threads
        self._repo = Repo(str(project.root), _wait_for_lock=True)

    def receipt(self, stage: Stage, model: str | None = None) -> str | None:
        """A hash of what the stage was made from and made, or None unless the outputs on disk are exactly that, now.

        A stage that is being made by somebody else at this moment has no receipt.
        """
        with self._guard:
            if stage.always or self._changes(stage, model):
                return None
            entry = lock_entries(self._project).get(stage.address(model))
        return entry and hashlib.sha256(json.dumps(entry, sort_keys=True).encode()).hexdigest()

    def reasons(self, stage: Stage, model: str | None = None) -> list[str]:
        """Why the stage would run, in words; empty if it would not (on account of itself: see `explain`)."""
        with self._guard:
            changes = self._changes(stage, model)
            entry = lock_entries(self._project).get(stage.address(model))
        if entry is None:
            return ["it has never run here"]
        return [text for change in changes for text in _in_words(change, entry, self._current_params())]

    def explain(self) -> dict[str, list[str]]:
        """Every stage instance's address with the reasons it is stale, stages behind a stale one included."""
        found: dict[str, list[str]] = {}
        stale: set[str] = set()
        for stage, model in instances(load(self._project.params_file).models):
            reasons = _input_changes(stage, self._project) if stage.always else self.reasons(stage, model)
            behind = sorted(upstream(stage) & stale)
            if behind:
                reasons = [*reasons, f"reads what {', '.join(behind)} will make anew"]
            if reasons:
                stale.add(stage.name)
            found[stage.address(model)] = reasons
        return found

    def _changes(self, stage: Stage, model: str | None) -> list[Any]:
        from dvc.exceptions import DvcException
        from dvc.lock import LockError

        self._repo._reset()  # forget the files as they were at the last question
        address = stage.address(model)
        try:
            with self._repo.lock:
                return self._repo.stage.load_one(name=address).status().get(address, [])
        except LockError:
            return [{"busy": "another process is making it"}]
        except DvcException as error:
            return [{"error": str(error)}]

    def _current_params(self) -> dict[str, Any]:
        from ruamel.yaml import YAML

        return YAML(typ="safe", pure=True).load(self._project.params_file.read_text(encoding="utf-8"))


def lock_entries(project: Project) -> dict[str, dict]:
    """The stages of dvc.lock as plain mappings; empty before the first run."""
    from ruamel.yaml import YAML

    path = project.root / LOCK_FILE
    if not path.exists():
        return {}
    return (YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8")) or {}).get("stages", {})


def _input_changes(stage: Stage, project: Project) -> list[str]:
    """An always-run stage is stale when running it now would make something else."""
    import tempfile
    from pathlib import Path

    from stacklm.config.params import section
    from stacklm.files import sha256

    params = load(project.params_file)
    with tempfile.TemporaryDirectory() as folder:
        written = {argument: Path(folder) / argument for argument in stage.writes}
        stage.load()(**{argument: section(params, key) for argument, key in stage.params.items()}, **written)
        kept = stage.paths(stage.writes, project.root)
        if any(not path.exists() for path in kept.values()):
            return ["it has never run here"]
        return ["the source's files changed"] if any(sha256(written[a]) != sha256(kept[a]) for a in kept) else []


def _in_words(change: Any, entry: dict, current: dict) -> list[str]:
    """One item of DVC's status as sentences."""
    if change == "changed checksum":
        return ["its definition in dvc.yaml changed"]
    if not isinstance(change, dict):
        return [str(change)]
    found: list[str] = []
    for what, paths in change.items():
        if isinstance(paths, str):
            found.append(paths)
            continue
        for path, how in paths.items():
            if isinstance(how, dict):  # a params file: its keys, or keys below them
                found.extend(f"{key}: {_before_and_now(key, entry, current)}" for key in how)
            elif what == "changed outs":
                found.append(f"{path} {'is missing' if how == 'deleted' else f'was {how}'}")
            else:
                found.append(f"{path} was {how}")
    return found


def _before_and_now(key: str, entry: dict, current: Any) -> str:
    before = entry.get("params", {}).get("params.yaml", {})
    old = before.get(key, before.get(key.partition(".")[0], "default"))
    for name in key.split("."):
        current = current.get(name, "default") if isinstance(current, dict) else "default"
    if isinstance(old, dict) and isinstance(current, dict):
        both = [(name, old.get(name, "default"), current.get(name, "default")) for name in {**old, **current}]
        return ", ".join(f".{name} {was} -> {now}" for name, was, now in both if was != now)
    return f"{old} -> {current}"
