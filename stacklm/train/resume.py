"""Which checkpoints a run may resume from: intact ones of an identical run.

Up to a given step a run is determined by model, data, seed, batches and the learning rates so far. A later `hard_stop`, or with the
schedule `wsd` a larger `max_steps`, changes none of these, so a longer run need not start from scratch: it resumes from the newest
checkpoint of an earlier run that is also valid for itself (`warm_start`), and ends in the same bytes as a run from scratch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from stacklm.config.schema import Differences, ParamsError, differing_fields, listed, read
from stacklm.config.train import Train
from stacklm.files import publish, read_json, sha256, write_jsonl
from stacklm.train import CheckpointError
from stacklm.train.metrics import METRICS, TIMING, is_count, read_rows, row_every
from stacklm.train.optimizer import lr_factor

STATE, HASHES = "state.json", "hashes.json"
NAME = re.compile(r"step-(\d{8,})")
CURVE = ("max_steps", "warmup_steps", "lr_schedule", "decay_fraction", "final_lr_fraction")
"""Learning-rate settings, compared by the resulting rates."""
ROUNDING = ("micro_batch_size", "activation_checkpointing", "compile", "threads", "device", "nproc", "strategy")
"""Settings that change results only by rounding."""
UPKEEP = ("hard_stop", "checkpoint_every", "keep_checkpoints", "keep_every", "resume")
"""Settings that do not change results."""
ROWS = ("eval_every", "eval_tokens")
"""Settings that change only the rows of the metrics, not the weights."""


class DamagedError(Exception):
    """A checkpoint whose files were damaged or modified."""


def step_of(folder: Path) -> int:
    """The step of a checkpoint, from its name."""
    return int(folder.name.removeprefix("step-"))


def saved(checkpoints: Path) -> list[Path]:
    """The checkpoints in a folder, by step. Other files are ignored."""
    found = checkpoints.iterdir() if checkpoints.is_dir() else ()
    return sorted((path for path in found if NAME.fullmatch(path.name) and path.is_dir()), key=step_of)


def read_state(folder: Path) -> dict[str, Any]:
    """The state of a checkpoint. Raises `DamagedError` if it is missing or malformed."""
    state = _read_object(folder / STATE)
    progress = state.get("progress")
    if not isinstance(progress, dict) or progress.keys() != {"step", "tokens", "seconds"}:
        raise DamagedError(f"{STATE}: progress is not an object with step, tokens and seconds")
    valid_loss = state.get("valid_loss")
    wrong = [
        key
        for key, right in {
            "progress.step": is_count(progress["step"]) and progress["step"] == step_of(folder),
            "progress.tokens": is_count(progress["tokens"]),
            "progress.seconds": _is_finite(progress["seconds"]) and progress["seconds"] >= 0,
            "valid_loss": "valid_loss" in state and (valid_loss is None or _is_finite(valid_loss)),
            "processes": is_count(state.get("processes")) and state["processes"] > 0,
            "identity": isinstance(state.get("identity"), dict),
            "files": isinstance(state.get("files"), list) and all(map(_is_plain_name, state["files"])) and bool(state["files"]),
        }.items()
        if not right
    ]
    if wrong:
        raise DamagedError(f"{STATE}: missing or wrong {listed(wrong)}")
    return state


def verify(folder: Path) -> dict[str, Any]:
    """The state of a checkpoint, after checking that a hash covers every file that would be read, and that all hashes match.

    Raises `DamagedError` otherwise, also for a tensor file that does not belong to the checkpoint, since it would be read.
    """
    hashes = _read_object(folder / HASHES)
    for file, written in hashes.items():
        if Path(file).name != file or not (folder / file).is_file():
            raise DamagedError(f"{file} is missing")
        if (found := sha256(folder / file)) != written:
            raise DamagedError(f"{file} has SHA-256 {found}, but {written} was written")
    state = read_state(folder)
    if hashes.keys() != {STATE, *state["files"]}:
        raise DamagedError(f"{HASHES} is about {listed(sorted(hashes)) or 'no file'}, not {listed([STATE, *state['files']])}")
    if foreign := {path.name for path in folder.glob("*.safetensors")} - hashes.keys():
        raise DamagedError(f"{listed(sorted(foreign))} was not written with it")
    return state


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = read_json(path)
    except FileNotFoundError:
        raise DamagedError(f"{path.name} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedError(f"{path.name} cannot be read ({error})") from None
    if not isinstance(value, dict):
        raise DamagedError(f"{path.name} is not a JSON object")
    return value


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_plain_name(name: Any) -> bool:
    return isinstance(name, str) and name.endswith(".safetensors") and not set(name) & set("/\\\0:")


def incompatible_fields(then: Mapping[str, Any], now: Mapping[str, Any], step: int) -> Differences:
    """The fields in which two identities differ after `step` steps by more than rounding: dotted keys with both values."""
    ignored = {f"train.{key}" for key in (*ROUNDING, *UPKEEP, *ROWS)}
    if _same_rates(then.get("train"), now.get("train"), step):
        ignored |= {f"train.{key}" for key in CURVE}
    return {key: values for key, values in differing_fields(then, now).items() if key not in ignored}


def rounding_fields(then: Mapping[str, Any], now: Mapping[str, Any]) -> Differences:
    """The fields in which two identities differ by rounding."""
    return {key: values for key, values in differing_fields(then, now).items() if key.removeprefix("train.") in ROUNDING}


def _same_rates(then: Any, now: Any, step: int) -> bool:
    try:
        before, after = read(Train, then), read(Train, now)
    except ParamsError:
        return False
    return all(lr_factor(i, before) == lr_factor(i, after) for i in range(1, step + 1))


def warm_start(work: Path, earlier: Iterable[Path], identity: Mapping[str, Any], config: Train) -> None:
    """Copy the newest checkpoint of the `earlier` work folders that is valid for this run to `work`, with its log rows.

    Does nothing if `work` already has a checkpoint; damaged checkpoints, or ones with damaged rows, are skipped. The timing row
    of that step records the source as `goes_on_from`.
    """
    if saved(work / "checkpoints"):
        return
    usable = ((folder, rows) for folder in _by_step(earlier) if (rows := _rows_of(folder, identity, config)))
    if (found := next(usable, None)) is None:
        return
    folder, (metrics, timing) = found
    other, step = folder.parent.parent, step_of(folder)
    timing[-1]["goes_on_from"] = f"{other.name}, step {step}"
    for name, rows in {METRICS: metrics, TIMING: timing}.items():
        write_jsonl(work / name, rows)
    try:
        publish(folder, work / "checkpoints" / folder.name)
    except FileNotFoundError:  # removed meanwhile by the run that uses that folder
        return
    print(f"resuming from a checkpoint of an identical run at step {step:,} ({other.name})")


def _by_step(earlier: Iterable[Path]) -> list[Path]:
    """The checkpoints of those work folders, newest first."""
    folders = (folder for work in earlier for folder in saved(work / "checkpoints"))
    return sorted(folders, key=lambda folder: (step_of(folder), folder), reverse=True)


def _rows_of(folder: Path, identity: Mapping[str, Any], config: Train) -> tuple[list[dict], list[dict]] | None:
    """The metrics and timing rows up to a checkpoint; None unless a run of this `identity` may resume from it."""
    step, work = step_of(folder), folder.parent.parent
    if not 0 < step <= config.last_step:
        return None
    try:
        then = verify(folder)["identity"]
        alike = not incompatible_fields(then, identity, step) and _same_rows(then, identity)
        if not alike or (rounding_fields(then, identity) and config.resume != "compatible"):
            return None
        every = row_every(then["train"]["max_steps"])
        metrics, timing = (read_rows(work / name, step, every) for name in (METRICS, TIMING))
    except (DamagedError, CheckpointError):
        return None
    metrics = _until(metrics, step, config)
    if step == config.last_step and "valid_loss" not in metrics[-1]:  # from a run that did not stop there
        return None
    steps = {row["step"] for row in metrics}
    return metrics, [row for row in timing if row["step"] in steps]


def _same_rows(then: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether the rows of `then` include those of `now`."""
    before, after = then["train"], now["train"]
    every, earlier = row_every(after["max_steps"]), row_every(before["max_steps"])
    return all(before.get(key) == after[key] for key in ROWS) and every % earlier == 0


def _until(rows: list[dict[str, Any]], step: int, config: Train) -> list[dict[str, Any]]:
    """The rows up to a step as this run would have written them: the earlier run also validated at its last step."""
    kept = []
    for row in (row for row in rows if row["step"] <= step):
        if row["step"] % config.eval_every and row["step"] != config.last_step:
            row = {key: value for key, value in row.items() if not key.startswith(("valid_", "health/"))}
        if row["step"] % row_every(config.max_steps) == 0 or "valid_loss" in row or row["step"] == config.last_step:
            kept.append(row)
    return kept
