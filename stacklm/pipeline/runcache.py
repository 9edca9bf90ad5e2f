"""What DVC would restore from its cache instead of running a stage, foretold for stages behind stages that are restored.

DVC answers this for one stage whose inputs are on the disk (`dvc repro --dry`). For the stages behind it the hashes of
their inputs are known too, from the cache. There is no public API for that: `StageCache._load` and `_create_stage` are
used, and a test runs what this foretells.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Outputs = Mapping[str, Any]
"""DVC's hash of each output by its path."""


class Unknown(Exception):
    """It cannot be foretold: an input is not there."""


def restorable(stage: Any, restored: Outputs) -> tuple[Outputs | None, bool]:
    """The outputs that DVC would restore for its object `stage`, or None if it would run it; and whether its inputs are the
    recorded ones.

    `restored` are outputs of stages before it that will have been restored by then. Changes `stage`. Raises `Unknown`.
    """
    from dvc.exceptions import DvcException

    recorded = [dep.hash_info for dep in stage.deps]
    try:
        for dep in stage.deps:
            _foretell(dep, restored)
        if [dep.hash_info for dep in stage.deps] == recorded and not stage.changed_stage() and all(o.hash_info for o in stage.outs):
            return _outputs(stage), True
        entry = stage.repo.stage_cache._load(stage)
    except (DvcException, OSError) as error:
        raise Unknown from error
    return _outputs(stage.repo.stage_cache._create_stage(entry, wdir=stage.wdir)) if entry else None, False


def _outputs(stage: Any) -> Outputs | None:
    return {out.def_path: out.hash_info for out in stage.outs} if stage.outs_cached() else None


def _foretell(dep: Any, restored: Outputs) -> None:
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
