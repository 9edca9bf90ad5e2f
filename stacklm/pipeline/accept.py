"""Accepting a code change by hand: a stage's outputs stay valid although its code changed, and its record says so."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from stacklm.code import digest
from stacklm.config.params import Params, load
from stacklm.config.schema import ParamsError, listed
from stacklm.files import read_json, write_json
from stacklm.pipeline.code import write_code
from stacklm.pipeline.dvc import commit
from stacklm.pipeline.freshness import Pipeline
from stacklm.pipeline.locks import hold_project
from stacklm.pipeline.project import Project
from stacklm.pipeline.stages import Instance, instances


def accept(project: Project, names: Sequence[str], reason: str) -> Iterator[tuple[str, list[str]]]:
    """Record that the outputs of the named stages are valid for their current code; yields each address and the code changes.

    `names` are stages (of every model) or addresses, such as `pretrain@dense`. Raises `ParamsError` if a stage cannot be
    accepted: something besides its code changed, nothing changed, or it certifies code and therefore has to run.
    """
    with hold_project(project, "`stacklm accept`", wait=False):
        params = load(project.params_file)
        for item in _chosen(params, names):
            address = item.address
            outlook = Pipeline(project).explain()[address]
            excused = {item.record}  # modified by an earlier `accept` that was killed
            excused |= {item.fill(item.stage.reads[argument]) for argument in item.stage.checks}
            if others := [text for text in outlook.others if text.removesuffix(" was modified") not in excused]:
                raise ParamsError(f"{address}: more than its code changed, so it has to run ({'; '.join(others)})")
            if not outlook.reasons:
                raise ParamsError(f"{address}: up to date; there is nothing to accept")
            _record(project, item, params, outlook.code, reason)
            commit(project, address)
            yield address, outlook.code


def _chosen(params: Params, names: Sequence[str]) -> list[Instance]:
    known = list(instances(params))
    for name in names:
        found = [item.stage for item in known if name in (item.stage.name, item.address)]
        if not found:
            raise ParamsError(f"no stage {name!r}; the stages are {listed(item.address for item in known)}")
        if found[0].always or "certificate" in found[0].writes:
            raise ParamsError(f"{name}: cannot be accepted by hand, since it checks the current state: run `dvc repro {name}`")
    return [item for item in known if item.stage.name in names or item.address in names]


def _record(project: Project, item: Instance, params: Params, changed: list[str], reason: str) -> None:
    """Add a note to the record of the run that made the outputs. Its fingerprint and code remain those of that run."""
    code = write_code(project, item, params)
    path = project.root / item.record
    note = {"date": time.strftime("%Y-%m-%d"), "reason": reason, "changed": changed, "code": digest(code)}
    record = read_json(path)
    earlier = [one for one in record.get("accepted", []) if one["code"] != note["code"]]
    write_json(path, {**record, "accepted": [*earlier, note]})
