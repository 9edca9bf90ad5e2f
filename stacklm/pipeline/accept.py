"""Accepting a change of code by hand: what a stage made is kept although its code changed, and its record says so."""

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
from stacklm.pipeline.stages import Stage, instances


def accept(project: Project, names: Sequence[str], reason: str) -> Iterator[tuple[str, list[str]]]:
    """Record that what the named stages made holds for their code as it is now; yields each address and what changed in its code.

    `names` are stages (of every model) or addresses, such as `pretrain@dense`. Raises `ParamsError` where a stage cannot be
    accepted: anything but its code changed, nothing changed, or it certifies code and therefore has to run.
    """
    with hold_project(project, "`stacklm accept`", wait=False):
        for stage, model in _chosen(load(project.params_file), names):
            address = stage.address(model)
            outlook = Pipeline(project).explain()[address]
            excused = {stage.record(model)}  # modified by an earlier `accept` that was killed
            excused |= {stage.reads[argument].format(model=model) for argument in stage.checks}
            if others := [text for text in outlook.others if text.removesuffix(" was modified") not in excused]:
                raise ParamsError(f"{address}: more than its code changed, so it has to run ({'; '.join(others)})")
            if not outlook.reasons:
                raise ParamsError(f"{address}: up to date; there is nothing to accept")
            _record(project, stage, model, outlook.code, reason)
            commit(project, address)
            yield address, outlook.code


def _chosen(params: Params, names: Sequence[str]) -> list[tuple[Stage, str | None]]:
    known = list(instances(params.models))
    for name in names:
        found = [stage for stage, model in known if name in (stage.name, stage.address(model))]
        if not found:
            raise ParamsError(f"no stage {name!r}; the stages are {listed(stage.address(model) for stage, model in known)}")
        if found[0].always or "certificate" in found[0].writes:
            raise ParamsError(f"{name}: not accepted by hand, since it examines what there is now: `dvc repro {name}` runs it")
    return [(stage, model) for stage, model in known if stage.name in names or stage.address(model) in names]


def _record(project: Project, stage: Stage, model: str | None, changed: list[str], reason: str) -> None:
    """Add to the record of the run that made the outputs. Its fingerprint and code stay those of that run."""
    code = write_code(project, stage)
    path = project.root / stage.record(model)
    note = {"date": time.strftime("%Y-%m-%d"), "reason": reason, "changed": changed, "code": digest(code)}
    record = read_json(path)
    earlier = [one for one in record.get("accepted", []) if one["code"] != note["code"]]
    write_json(path, {**record, "accepted": [*earlier, note]})
