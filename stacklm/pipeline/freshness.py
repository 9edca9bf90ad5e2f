"""What is up to date, and why the rest is not: asked of DVC, the one authority, in this process."""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import tempfile
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML, YAMLError

from stacklm.code import digest
from stacklm.config.params import Params, load
from stacklm.files import read_json
from stacklm.pipeline.code import changed_units, code_files, code_text, shortened
from stacklm.pipeline.project import Project
from stacklm.pipeline.stages import Instance, inputs_of, instances, stage

LOCK_FILE = "dvc.lock"


class Verdict(StrEnum):
    """What `dvc repro` does with a stage."""

    KEEP = "up to date"
    SAME = "will run, to the same outputs"
    RESTORE = "will be restored from the cache"
    EITHER = "will be restored from the cache, or run"
    RUN = "will run"


@dataclass(frozen=True)
class Outlook:
    """What `dvc repro` would do with one stage instance, and why: no reasons if it is up to date.

    `code` names the functions and classes that changed since it was made; `others` are the reasons besides that.
    """

    verdict: Verdict
    others: list[str]
    code: list[str] = field(default_factory=list)

    @property
    def reasons(self) -> list[str]:
        return [*([f"{shortened(self.code)} changed"] if self.code else []), *self.others]


class Pipeline:
    """DVC's view of a project. Opening it takes about a second, a question some hundredths."""

    def __init__(self, project: Project) -> None:
        from dvc.repo import Repo

        logging.getLogger("dvc").setLevel(logging.ERROR)
        self._project = project
        self._guard = threading.Lock()  # DVC's objects are not made for several threads
        self._repo = Repo(str(project.root), _wait_for_lock=True)

    def receipt(self, address: str) -> str | None:
        """A hash of what the stage was made from and made, or None unless the outputs on disk are exactly that, now.

        A stage that is being made by somebody else at this moment has no receipt, nor has one that DVC cannot read.
        """
        from dvc.exceptions import DvcException

        if stage(address.partition("@")[0]).always:
            return None
        try:
            with self._open(address) as opened:
                changed = bool(opened.status())
                entry = lock_entries(self._project).get(address)
        except DvcException:
            return None
        return None if changed or not entry else digest(entry)

    def explain(self) -> dict[str, Outlook]:
        """The outlook of every stage instance by its address. Raises `RuntimeError` with DVC's message where it has none."""
        from dvc.exceptions import DvcException

        found: dict[str, Outlook] = {}
        restored: dict[str, Any] = {}
        params = load(self._project.params_file)
        for item in instances(params):
            upstream = {i.address: found[i.address] for i in inputs_of(item, params) if found[i.address].reasons}
            try:
                outlook = self._always(item, restored) if item.stage.always else self._outlook(item, params, upstream, restored)
            except DvcException as error:
                raise RuntimeError(str(error)) from error
            found[item.address] = outlook
        return found

    def _outlook(self, item: Instance, params: Params, upstream: Mapping[str, Outlook], restored: dict[str, Any]) -> Outlook:
        """Of one instance behind the stale instances `upstream`; adds to the outputs that will be `restored`."""
        from dvc.exceptions import DvcException

        code = code_files(self._project, item, params)
        with self._open(item.address) as opened:
            changes, changed_code = self._changes(opened, item, code)
            if not changes and not changed_code and not upstream:
                return Outlook(Verdict.KEEP, [])
            before = (outlook.verdict for address, outlook in upstream.items() if not stage(address.partition("@")[0]).always)
            verdict = max(before, key=list(Verdict).index, default=Verdict.SAME)  # what an always-run stage makes is known
            if verdict in (Verdict.SAME, Verdict.RESTORE):
                try:
                    outputs, same = _restorable(opened, {**restored, **{name: _hash_of(units) for name, units in code.items()}})
                except (DvcException, OSError):
                    verdict = Verdict.EITHER
                else:
                    if same and not any("changed outs" in change for change in changes):
                        return Outlook(Verdict.KEEP, [])
                    verdict = Verdict.RESTORE if outputs else Verdict.RUN
                    restored |= outputs or {}
        reasons = [f"upstream {', '.join(upstream)} is stale"] if upstream else []
        entry = lock_entries(self._project).get(item.address)
        if entry is None:
            return Outlook(verdict, ["dvc.lock has no run of it", *reasons])
        current = YAML(typ="safe", pure=True).load(self._project.params_file.read_text(encoding="utf-8"))
        reasons = [*(text for change in changes for text in _in_words(change, entry, current)), *reasons]
        return Outlook(verdict, reasons, changed_code)

    def _changes(self, opened: Any, item: Instance, code: Mapping[str, Mapping[str, str]]) -> tuple[list[Any], list[str]]:
        """What DVC finds changed in its object for an instance, and the names of what changed in its code.

        DVC knows the code from files that hold it as it was when the last run began; here it counts as it is now.
        """
        changes = opened.status().get(item.address, [])
        for change in changes:
            if isinstance(change, dict):
                for name in code:
                    change.get("changed deps", {}).pop(name, None)
        changes = [change for change in changes if not isinstance(change, dict) or any(change.values())]
        recorded = {dep.def_path: dep.hash_info for dep in opened.deps if dep.def_path in code and dep.hash_info}
        changed: list[str] = []
        for name, then in recorded.items():
            if then != _hash_of(code[name]):
                kept = Path(opened.repo.cache.local.oid_to_path(then.value))
                changed += changed_units(read_json(kept), code[name]) if kept.exists() else ["its code"]
        return changes, changed

    def _always(self, item: Instance, restored: dict[str, Any]) -> Outlook:
        """An always-run stage is stale when running it now would make something else, or when its outputs are missing.

        Adds what it will make to the outputs that will be `restored`.
        """
        stage, settings = item.stage, item.settings(load(self._project.params_file))
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()), self._open(item.address) as opened:
            written = {argument: Path(folder) / argument for argument in stage.writes}
            stage.load()(**settings, **written)
            recorded = {out.def_path: out.hash_info for out in opened.outs if out.def_path in stage.writes.values()}
            made = {stage.writes[argument]: path.read_bytes() for argument, path in written.items()}
        hashes = {path: _md5(data) for path, data in made.items()}
        restored |= hashes
        if not all(recorded.values()):
            return Outlook(Verdict.RUN, ["dvc.lock has no run of it"])
        if changed := [path for path, known in hashes.items() if known != recorded[path]]:
            owners = ("a benchmark's" if "benchmarks" in path else "the source's" for path in changed)
            return Outlook(Verdict.RUN, [f"{owner} files changed" for owner in owners])
        if all((self._project.root / path).is_file() and (self._project.root / path).read_bytes() == made[path] for path in made):
            return Outlook(Verdict.KEEP, [])
        return Outlook(Verdict.SAME, ["its outputs are missing or changed"])

    @contextlib.contextmanager
    def _open(self, address: str) -> Iterator[Any]:
        """DVC's own object for a stage, read afresh. Raises `DvcException` where DVC cannot or another process is at it."""
        with self._guard, contextlib.chdir(self._project.root):  # DVC takes names as from the current directory
            self._repo._reset()  # forget the files as they were at the last question
            with self._repo.lock:
                yield self._repo.stage.load_one(name=address)


def _hash_of(units: Mapping[str, str]) -> Any:
    """DVC's hash of a file about that code."""
    return _md5(code_text(units).encode())


def _md5(data: bytes) -> Any:
    """DVC's hash of a file with that content."""
    from dvc_data.hashfile.hash_info import HashInfo

    return HashInfo("md5", hashlib.md5(data, usedforsecurity=False).hexdigest())


def _restorable(stage: Any, restored: Mapping[str, Any]) -> tuple[Mapping[str, Any] | None, bool]:
    """The outputs that DVC would restore for its object `stage`, or None if it would run it; and whether its inputs are the
    recorded ones.

    `restored` are DVC's hashes, by path, of outputs of stages before it that will have been restored by then. Changes `stage`.
    Raises `DvcException` and `OSError` where it cannot be foretold: an input is not there.

    DVC answers this for one stage whose inputs are on the disk (`dvc repro --dry`). For the stages behind it the hashes of
    their inputs are known too, from the cache. There is no public API for that: `StageCache._load` and `_create_stage` are
    used, and a test runs what this foretells.
    """
    recorded = [dep.hash_info for dep in stage.deps]
    for dep in stage.deps:
        _foretell(dep, restored)
    if [dep.hash_info for dep in stage.deps] == recorded and not stage.changed_stage() and all(o.hash_info for o in stage.outs):
        return _outputs(stage), True
    entry = stage.repo.stage_cache._load(stage)
    return _outputs(stage.repo.stage_cache._create_stage(entry, wdir=stage.wdir)) if entry else None, False


def _outputs(stage: Any) -> Mapping[str, Any] | None:
    return {out.def_path: out.hash_info for out in stage.outs} if stage.outs_cached() else None


def _foretell(dep: Any, restored: Mapping[str, Any]) -> None:
    """Give an input the hash that it will have: as it is on the disk, but for the outputs in it that will be restored."""
    from dvc_data.hashfile import load
    from dvc_data.hashfile.tree import Tree

    if dep.def_path in restored:
        dep.hash_info, dep.meta = restored[dep.def_path], type(dep.meta)()  # the meta from dvc.lock holds a hash too
        dep.get_hash = lambda: dep.hash_info  # DVC asks for it once more, and there may be no such file yet
        return
    dep.save()
    folder = f"{dep.def_path}/"
    inside = {tuple(path.removeprefix(folder).split("/")): known for path, known in restored.items() if path.startswith(folder)}
    if not inside:
        return
    tree = Tree()
    for key, meta, known in dep.get_obj():
        if not any(key[: len(place)] == place for place in inside):
            tree.add(key, meta, known)
    for place, known in inside.items():
        files: Any = load(dep.repo.cache.local, known) if known.isdir else [((), None, known)]
        for key, meta, file in files:
            tree.add((*place, *key), meta, file)
    tree.digest()
    dep.hash_info = tree.hash_info


def lock_entries(project: Project) -> dict[str, dict]:
    """The stages of dvc.lock as plain mappings; empty before the first run. Raises `RuntimeError` for a damaged file."""
    path = project.root / LOCK_FILE
    if not path.exists():
        return {}
    try:
        return (YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8")) or {}).get("stages") or {}
    except (YAMLError, UnicodeDecodeError, AttributeError) as error:
        raise RuntimeError(f"{LOCK_FILE}: not readable ({error}); `git checkout {LOCK_FILE}` brings back the last one") from None


def _in_words(change: Any, entry: dict, current: dict) -> list[str]:
    """One item of DVC's status as sentences."""
    if change == "changed checksum":
        return ["its definition in dvc.yaml changed"]
    if not isinstance(change, dict):
        return [str(change)]
    found: list[str] = []
    for what, paths in change.items():
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
