"""Checkpoints: all a run needs to go on exactly as if it had never stopped.

One folder each, `step-00000050/`: weights, optimizer state and random states as safetensors, the rest as JSON (nothing
that can run code when read), and the SHA-256 of every file. A folder is written aside, synced and renamed, so a
checkpoint is there in full or not at all; what the disk did to it since, the hashes tell.

The format is that of `torch.distributed.checkpoint` with safetensors storage: a tensor may lie in pieces in several files,
with the offset of each piece in its file's header. One process writes a single file, straight from the tensors' own
memory; many write one each, with what they hold. Whoever reads picks the pieces that it needs, so a run goes on with
another number of processes, sharded or not. Of the random states a process takes the one of its rank, where there is one.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from stacklm.config.schema import listed
from stacklm.files import read_json, remove, sha256, sync, write_json
from stacklm.train.errors import CheckpointError, DiskFullError, NonFiniteError
from stacklm.train.identity import decisive
from stacklm.train.team import ALONE, Team

TENSORS, STATE, HASHES = "tensors.safetensors", "state.json", "hashes.json"
GPU_RANDOM = {
    "cuda": (torch.cuda.get_rng_state, torch.cuda.set_rng_state),
    "mps": (torch.mps.get_rng_state, torch.mps.set_rng_state),
}
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class _Damaged(Exception):
    """A checkpoint whose files are not what was written."""


@dataclass(frozen=True)
class Progress:
    """How far a run has come: optimizer steps, tokens and seconds of training, resumes added up."""

    step: int
    tokens: int
    seconds: float


class Checkpoints:
    """A run's checkpoints in `folder`: the last `keep`, the one of the best validation loss, and those of milestone steps.

    `identity` is a plain mapping of all that makes the run what it is; only a checkpoint on the same way is resumed
    (`stacklm.train.identity`). All processes of `team` see the same folder, and call `save` and `restore` together.
    """

    def __init__(
        self,
        folder: Path,
        identity: Mapping[str, Any],
        keep: int,
        milestone: Callable[[int], bool] = lambda step: False,
        team: Team = ALONE,
    ) -> None:
        self.folder, self.identity, self.team = folder, identity, team
        self.keep, self.milestone = keep, milestone

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress, valid_loss: float | None = None) -> None:
        """Write the checkpoint of this step, then remove those that need not be kept.

        `valid_loss` belongs to this very step. Raises `NonFiniteError` for weights or a loss that are not finite, and
        `DiskFullError` where there is no room; the checkpoints that are there stay as they are.
        """
        self.team.together(lambda: _check_finite(model, progress.step, valid_loss))
        state = {"progress": asdict(progress), "valid_loss": valid_loss, "processes": self.team.size, "identity": self.identity}
        tensors = {**_weights(model), **_optimizer_state(model, optimizer), **_random_states(model, self.team.rank)}
        aside = self.folder / ".writing"
        tidy = _removed_on_error(aside) if self.team.leads else nullcontext()
        with _room_for(tensors, progress.step, self.folder), tidy:
            self.team.together(lambda: _make_anew(aside) if self.team.leads else None)
            mine = _write(aside, tensors, self.team)
            hashes = self.team.together(lambda: {file.name: sha256(file) for file in mine})
            self.team.together(lambda: self._complete(aside, state, hashes) if self.team.leads else None)

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Progress | None:
        """Bring model, optimizer and random states to the newest whole checkpoint; None where there is none.

        A damaged one is reported, removed and passed over for the one before. Raises `CheckpointError`, naming the
        fields that differ, for one of another identity.
        """
        folder = self.team.together(lambda: self._newest_whole() if self.team.leads else None)[0]
        if folder is None:
            return None
        state = read_json(folder / STATE)
        self._check_identity(folder, state["identity"], state["progress"]["step"])
        if self.team.leads and state["processes"] != self.team.size:
            numbers = f"{state['processes']} processes, going on with {self.team.size}"
            print(f"checkpoint {folder.name} is of {numbers}: what follows differs by rounding", file=sys.stderr)
        self.team.together(lambda: _load(folder, model, optimizer, self.team.rank))
        return Progress(**state["progress"])

    def _complete(self, aside: Path, state: dict[str, Any], hashes: list[dict[str, str]]) -> None:
        """What is done once, when the tensors are on the disk."""
        files = {name: digest for written in hashes for name, digest in written.items()}
        missing = [name for name in files if not (aside / name).exists()]
        if missing:
            raise CheckpointError(f"{aside} lacks {listed(missing)}: the folder must be one that all nodes share")
        write_json(aside / STATE, state)
        write_json(aside / HASHES, {**files, STATE: sha256(aside / STATE)})
        os.replace(aside, self._folder(state["progress"]["step"]))
        sync(self.folder)
        for old in self._superfluous():
            remove(old)

    def _superfluous(self) -> list[Path]:
        saved = self._saved()
        kept = {*saved[-self.keep :], *(folder for folder in saved if self.milestone(int(folder.name.removeprefix("step-"))))}
        losses = {folder: loss for folder in saved if (loss := _valid_loss(folder)) is not None}
        if losses:
            kept.add(min(losses, key=losses.__getitem__))
        return [folder for folder in saved if folder not in kept]

    def _newest_whole(self) -> Path | None:
        for folder in reversed(self._saved()):
            try:
                _verify(folder)
                return folder
            except _Damaged as error:
                print(f"checkpoint {folder.name} is damaged, going back to the one before: {error}", file=sys.stderr)
                remove(folder)
        return None

    def _folder(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def _saved(self) -> list[Path]:
        return sorted(self.folder.glob("step-*"))

    def _check_identity(self, folder: Path, saved: Mapping[str, Any], step: int) -> None:
        """What differs by rounding, or only from here on, may differ: the run goes on with it."""
        if differences := decisive(saved, self.identity, step):
            changes = listed(f"{key} was {then} and is {now}" for key, (then, now) in differences.items())
            raise CheckpointError(f"{folder} is a checkpoint of another run: {changes}; remove {folder.parent} to start anew")


@contextmanager
def _room_for(tensors: dict[str, torch.Tensor], step: int, folder: Path) -> Iterator[None]:
    """Turn the end of the disk into an error with the numbers."""
    try:
        yield
    except BaseException as error:
        cause = _lack_of_room(error)
        if cause is None:
            raise
        needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        raise DiskFullError(
            f"no room for the checkpoint of step {step}: it takes {needed:,} bytes, and the disk of {folder} has "
            f"{shutil.disk_usage(folder).free:,} free ({cause}). The checkpoints before it are whole: free some space, "
            "or move the folder to a larger disk, and the same command goes on"
        ) from None


@contextmanager
def _removed_on_error(aside: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        remove(aside)
        raise


def _lack_of_room(error: BaseException) -> BaseException | None:
    """What says that there is no room, in one of the ways in which writers say so; None for any other error."""
    if isinstance(error, OSError):
        return error if error.errno in NO_ROOM else None
    if isinstance(error, SafetensorError):
        return error if any(f"os error {number}" in str(error) for number in NO_ROOM) else None
    failures = (failure for failure, _ in getattr(error, "failures", {}).values())  # of the processes of a team
    return next(filter(None, map(_lack_of_room, failures)), None)


def _make_anew(folder: Path) -> None:
    remove(folder)  # left by a kill
    folder.mkdir(parents=True)


def _write(aside: Path, tensors: dict[str, torch.Tensor], team: Team) -> list[Path]:
    """Write the tensors, each once however many processes hold it; return the files that this process wrote."""
    if team.size == 1:
        save_file(tensors, aside / TENSORS)
        sync(aside / TENSORS)
        return [aside / TENSORS]
    from torch.distributed.checkpoint import HuggingFaceStorageWriter, save

    save(tensors, storage_writer=HuggingFaceStorageWriter(str(aside), save_distributed=True))  # synced by the writer
    return list(aside.glob(f"shard-{team.rank + 1:05d}-*"))


def _load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, rank: int) -> None:
    """Read what this process holds: weights in place, the optimizer's state and the random states anew."""
    from torch.distributed.checkpoint import HuggingFaceStorageReader, load

    reader = HuggingFaceStorageReader(str(folder))
    saved = reader.read_metadata().state_dict_metadata
    _make_state(model, optimizer, {path: (meta.size, meta.properties.dtype) for path, meta in saved.items()})
    random = {path: state for path, state in _random_states(model, rank).items() if path in saved}
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # of reading alone, as each process does
        load({**_weights(model), **_optimizer_state(model, optimizer), **random}, storage_reader=reader, no_dist=True)
    _set_random_states(random)


def _verify(folder: Path) -> None:
    try:
        hashes = read_json(folder / HASHES)
        found = {file: sha256(folder / file) for file in hashes}
    except FileNotFoundError as error:
        raise _Damaged(f"{Path(error.filename).name} is missing") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise _Damaged(f"{HASHES} cannot be read ({error})") from None
    for file, written in hashes.items():
        if found[file] != written:
            raise _Damaged(f"{file} has SHA-256 {found[file]}, but {written} was written")


def _check_finite(model: nn.Module, step: int, valid_loss: float | None) -> None:
    if valid_loss is not None and not math.isfinite(valid_loss):
        raise NonFiniteError(f"step {step}: the validation loss is {valid_loss}; the checkpoint before it stays the last one")
    for name, parameter in model.named_parameters():
        weight = _local(parameter)
        if not torch.isfinite(weight.sum()) and not torch.isfinite(weight).all():  # the sum is fast, and may overflow
            raise NonFiniteError(f"step {step}: {name} is not finite; the checkpoint before it stays the last one")


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor that may be sharded."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _valid_loss(folder: Path) -> float | None:
    """The validation loss of a saved step; None where it was not measured or the note is damaged."""
    try:
        return read_json(folder / STATE)["valid_loss"]
    except (OSError, ValueError, KeyError):
        return None


def _weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers as `model/name`; what has several names, such as a tied head, goes by its first."""
    names: dict[int, str] = {}
    tensors = model.state_dict(keep_vars=True).items()
    return {f"model/{name}": tensor.detach() for name, tensor in tensors if names.setdefault(id(tensor), name) == name}


def _optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimizer's state as `optimizer/parameter/key`. Settings are not in it: they are part of the identity."""
    return {
        f"optimizer/{name}/{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _make_state(model: nn.Module, optimizer: torch.optim.Optimizer, saved: dict[str, tuple[torch.Size, torch.dtype]]) -> None:
    """Give the optimizer a state with the saved shapes and types, yet to be filled.

    What has its parameter's shape is sharded as the parameter is. Where a step count lies is the optimizer's rule.
    """
    optimizer.state.clear()
    name_of = {parameter: name for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        counts_on_device = group.get("fused") or group.get("capturable")
        for parameter in group["params"]:
            prefix = f"optimizer/{name_of[parameter]}/"
            for path in (path for path in saved if path.startswith(prefix)):
                key, (shape, dtype) = path.removeprefix(prefix), saved[path]
                if shape == parameter.shape:
                    state = torch.empty_like(parameter, dtype=dtype, requires_grad=False)
                else:
                    device = parameter.device if key != "step" or counts_on_device else "cpu"
                    state = torch.empty(shape, dtype=dtype, device=device)
                optimizer.state[parameter][key] = state


def _random_states(model: nn.Module, rank: int) -> dict[str, torch.Tensor]:
    """The states of the generators that a process draws from, as `random/rank/device`."""
    device = next(model.parameters()).device.type
    states = {f"random/{rank}/cpu": torch.get_rng_state()}
    if device in GPU_RANDOM:
        states[f"random/{rank}/{device}"] = GPU_RANDOM[device][0]()
    return states


def _set_random_states(states: dict[str, torch.Tensor]) -> None:
    for path, state in states.items():
        device = path.rpartition("/")[2]
        GPU_RANDOM[device][1](state) if device in GPU_RANDOM else torch.set_rng_state(state)
