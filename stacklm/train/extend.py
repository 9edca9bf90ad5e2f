"""Runs that share a beginning: a checkpoint of one is then a checkpoint of the other.

Up to a step a run is fixed by model, data, seed, batches and the learning rates so far. A later `stop_step`, or with the
schedule `wsd` a later horizon, leaves all of that as it was, so a longer run need not begin anew: it takes the newest
checkpoint of an earlier run that is also one of its own, and ends in the same bytes as if it had not.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from stacklm.config.train import Train
from stacklm.files import publish, read_json, read_jsonl, write_text
from stacklm.train.identity import ROWS, decisive, rounding
from stacklm.train.trainer import METRICS, TIMING, row_every


def adopt(work: Path, earlier: Iterable[Path], identity: Mapping[str, Any], config: Train) -> None:
    """Put the newest checkpoint of `earlier` work folders that is also one of this run into `work`, with its rows.

    Nothing is done where `work` has a checkpoint of its own. The note of it is in the rows of times.
    """
    if any((work / "checkpoints").glob("step-*")):
        return
    found = [(step, folder) for other in earlier for step, folder in _usable(other, identity, config)]
    if not found:
        return
    step, folder = max(found)
    other = folder.parent.parent
    metrics = _until(read_jsonl(other / METRICS), step, config)
    steps = {row["step"] for row in metrics}
    timing = [row for row in read_jsonl(other / TIMING) if row["step"] in steps]
    timing[-1]["goes_on_from"] = f"{other.name}, step {step}"
    for name, rows in {METRICS: metrics, TIMING: timing}.items():
        write_text(work / name, "".join(json.dumps(row) + "\n" for row in rows))
    try:
        publish(folder, work / "checkpoints" / folder.name)
    except FileNotFoundError:  # whoever works there has removed it meanwhile
        return
    print(f"an earlier run has come to step {step:,} on the same way ({other.name}): going on from its checkpoint")


def _usable(work: Path, identity: Mapping[str, Any], config: Train) -> Iterable[tuple[int, Path]]:
    """Steps and folders of the checkpoints that lead on to what `identity` is."""
    for folder in (work / "checkpoints").glob("step-*"):
        try:
            state = read_json(folder / "state.json")
            step, saved = state["progress"]["step"], state["identity"]
        except (OSError, ValueError, KeyError):
            continue
        alike = not decisive(saved, identity, step) and _same_rows(saved, identity)
        exact = not rounding(saved, identity)
        if 0 < step <= config.last_step and alike and (exact or config.resume == "close"):
            yield step, folder


def _same_rows(then: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether the rows of the one hold those of the other."""
    before, after = then["train"], now["train"]
    return all(before[key] == after[key] for key in ROWS) and row_every(after["steps"]) % row_every(before["steps"]) == 0


def _until(rows: list[dict[str, Any]], step: int, config: Train) -> list[dict[str, Any]]:
    """The rows up to a step as this run would have written them: the earlier one validated at its end."""
    kept = []
    for row in (row for row in rows if row["step"] <= step):
        if row["step"] % config.valid_every and row["step"] != config.last_step:
            row = {key: value for key, value in row.items() if not key.startswith(("valid_", "health/"))}
        if row["step"] % row_every(config.steps) == 0 or "valid_loss" in row or row["step"] == config.last_step:
            kept.append(row)
    return kept
