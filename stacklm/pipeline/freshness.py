"""Which stages are up to date, and why the others are not, according to DVC, which alone decides; DVC runs in this process."""

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
    SAME = "will run, with the same outputs"
    RESTORE = "will be restored from the cache"
    EITHER = "will be restored from the cache, or run"
    RUN = "will run"


@dataclass(frozen=True)
class Outlook:
    """What `dvc repro` would do with one stage instance, and why; without reasons if it is up to date.

    `code` names the functions and classes that changed since its last run; `others` are the other reasons.
    """

    verdict: Verdict
    others: list[str]
    code: list[str] = field(default_factory=list)

    @property
    def reasons(self) -> list[str]:
        return [*([f"{shortened(self.code)} changed"] if self.code else []), *self.others]


class Pipeline:
    """DVC's view of a project. Opening it takes about a second, a query some hundredths of a second."""

    def __init__(self, project: Project) -> None:
        from dvc.repo import Repo

        logging.getLogger("dvc").setLevel(logging.ERROR)
        self._project = project
        self._guard = threading.Lock()  # DVC's objects are not thread-safe
        self._repo = Repo(str(project.root), _wait_for_lock=True)

    def receipt(self, address: str) -> str | None:
        """A hash of the stage's recorded inputs and outputs, or None if what is on disk differs from the record.

        A stage that another process is running has no receipt, nor has one that DVC cannot read.
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
        """The outlook of every stage instance, by address. Raises `RuntimeError` with DVC's message if DVC fails."""
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
        """The outlook of one instance given the stale instances `upstream`; adds to the outputs that will be `restored`."""
        from dvc.exceptions import DvcException

        code = code_files(self._project, item, params)
        with self._open(item.address) as opened:
            changes, changed_code = self._changes(opened, item, code)
            if not changes and not changed_code and not upstream:
                return Outlook(Verdict.KEEP, [])
            before = (outlook.verdict for address, outlook in upstream.items() if not stage(address.partition("@")[0]).always)
            verdict = max(before, key=list(Verdict).index, default=Verdict.SAME)  # the outputs of an always-run stage are known
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
            return Outlook(verdict, ["no run is recorded in dvc.lock", *reasons])
        current = YAML(typ="safe", pure=True).load(self._project.params_file.read_text(encoding="utf-8"))
        reasons = [*(text for change in changes for text in _in_words(change, entry, current)), *reasons]
        return Outlook(verdict, reasons, changed_code)

    def _changes(self, opened: Any, item: Instance, code: Mapping[str, Mapping[str, str]]) -> tuple[list[Any], list[str]]:
        """The changes that DVC finds in its object for an instance, and the names of what changed in its code.

        The code files that DVC compares are those of the start of the last run; here the current code is compared.
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
        """The outlook of an always-run stage: stale if running it now would change its outputs, or if these are missing.

        Adds its new outputs to those that will be `restored`.
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
            return Outlook(Verdict.RUN, ["no run is recorded in dvc.lock"])
        if changed := [path for path, known in hashes.items() if known != recorded[path]]:
            owners = ("a benchmark's" if "benchmarks" in path else "the source's" for path in changed)
            return Outlook(Verdict.RUN, [f"{owner} files changed" for owner in owners])
        if all((self._project.root / path).is_file() and (self._project.root / path).read_bytes() == made[path] for path in made):
            return Outlook(Verdict.KEEP, [])
        return Outlook(Verdict.SAME, ["its outputs are missing or changed"])

    @contextlib.contextmanager
    def _open(self, address: str) -> Iterator[Any]:
        """DVC's own object for a stage, freshly read. Raises `DvcException` if DVC cannot read it or another process holds it."""
        with self._guard, contextlib.chdir(self._project.root):  # DVC resolves names from the current directory
            self._repo._reset()  # discard the cached state of files
            with self._repo.lock:
                yield self._repo.stage.load_one(name=address)


def _hash_of(units: Mapping[str, str]) -> Any:
    """DVC's hash of a code file with these units."""
    return _md5(code_text(units).encode())


def _md5(data: bytes) -> Any:
    """DVC's hash of a file with this content."""
    from dvc_data.hashfile.hash_info import HashInfo

    return HashInfo("md5", hashlib.md5(data, usedforsecurity=False).hexdigest())


def _restorable(stage: Any, restored: Mapping[str, Any]) -> tuple[Mapping[str, Any] | None, bool]:
    """The outputs that DVC would restore for its object `stage`, or None if it would run it; and whether its inputs are the
    recorded ones.

    `restored` maps paths to DVC's hashes of upstream outputs that will have been restored by then. Modifies `stage`.
    Raises `DvcException` and `OSError` if this cannot be predicted because an input is missing.

    DVC predicts this for one stage whose inputs are on disk (`dvc repro --dry`). For downstream stages the hashes of their
    inputs are also known, from the cache. There is no public API for that: `StageCache._load` and `_create_stage` are used,
    and a test checks the predictions by running the stages.
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
    """Give an input the hash that it will have: that of the files on disk, except for outputs that will be restored."""
    from dvc_data.hashfile import load
    from dvc_data.hashfile.tree import Tree

    if dep.def_path in restored:
        dep.hash_info, dep.meta = restored[dep.def_path], type(dep.meta)()  # the meta from dvc.lock also holds a hash
        dep.get_hash = lambda: dep.hash_info  # DVC asks again, and the file may not exist yet
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
    """The stages of dvc.lock as plain mappings; empty before the first run. Raises `RuntimeError` if the file is damaged."""
    path = project.root / LOCK_FILE
    if not path.exists():
        return {}
    try:
        return (YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8")) or {}).get("stages") or {}
    except (YAMLError, UnicodeDecodeError, AttributeError) as error:
        raise RuntimeError(f"{LOCK_FILE}: not readable ({error}); `git checkout {LOCK_FILE}` restores the committed one") from None


def _in_words(change: Any, entry: dict, current: dict) -> list[str]:
    """One item of DVC's status in words."""
    if change == "changed checksum":
        return ["its definition in dvc.yaml changed"]
    if not isinstance(change, dict):
        return [str(change)]
    found: list[str] = []
    for what, paths in change.items():
        for path, how in paths.items():
            if isinstance(how, dict):  # a params file: its keys, or nested keys
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
