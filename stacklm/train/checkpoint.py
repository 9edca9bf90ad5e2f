"""Checkpoints: everything a run needs to resume exactly as if it had never stopped.

One folder each, `step-00000050/`: weights, optimizer state and random states as safetensors, the rest as JSON (loading runs no
code), and the SHA-256 of every file. A folder is written under a temporary name, synced and renamed, so a checkpoint is complete
or absent; the hashes detect later corruption.

The format is that of `torch.distributed.checkpoint` with safetensors storage: a tensor may be split over several files, with the
offset of each piece in its file's header. A single process writes one file, straight from the tensors' own memory; several write
one each, with their shards. A reader loads the pieces that it needs, so a run can resume with another number of processes, sharded
or not. Each process restores the random state of its rank, if there is one.
"""

from __future__ import annotations

import errno
import math
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from stacklm.config.schema import listed
from stacklm.files import remove, sha256, sync, write_json
from stacklm.model.store import save_tensors
from stacklm.train import CheckpointError, DiskFullError, NonFiniteError
from stacklm.train.distributed import SINGLE, ProcessGroup
from stacklm.train.resume import (
    HASHES,
    STATE,
    DamagedError,
    incompatible_fields,
    read_state,
    rounding_fields,
    saved,
    step_of,
    verify,
)

TENSORS = "tensors.safetensors"
GPU_RANDOM = {
    "cuda": (torch.cuda.get_rng_state, torch.cuda.set_rng_state),
    "mps": (torch.mps.get_rng_state, torch.mps.set_rng_state),
}
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Progress:
    """Progress of a run: optimizer steps, tokens and seconds of training, summed over resumes."""

    step: int
    tokens: int
    seconds: float


class Checkpoints:
    """A run's checkpoints in `folder`: the last `keep`, the one with the best validation loss, and those of milestone steps.

    `identity` is a plain mapping of everything that defines the run; only a checkpoint of an identical run is resumed
    (`stacklm.train.resume`). All processes of `team` share the folder, and call `save` and `restore` together.
    """

    def __init__(
        self,
        folder: Path,
        identity: Mapping[str, Any],
        keep: int,
        milestone: Callable[[int], bool] = lambda step: False,
        team: ProcessGroup = SINGLE,
    ) -> None:
        self.folder, self.identity, self.team = folder, identity, team
        self.keep, self.milestone = keep, milestone

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress, valid_loss: float | None = None) -> None:
        """Write the checkpoint of this step, then remove those no longer needed.

        `valid_loss` is that of this step. Raises `NonFiniteError` for weights or a loss that are NaN or Inf, and `DiskFullError`
        if the disk is full; in both cases existing checkpoints are unchanged.
        """
        self.team.gather(lambda: _check_finite(model, progress.step, valid_loss))
        state = {"progress": asdict(progress), "valid_loss": valid_loss, "processes": self.team.size, "identity": self.identity}
        tensors = {**_weights(model), **_optimizer_state(model, optimizer), **_random_states(model, self.team.rank)}
        aside = self.folder / ".writing"
        with self._room_for(tensors, progress.step, aside):
            self.team.gather(lambda: _make_empty(aside) if self.team.is_main else None)
            mine = _write(aside, tensors, self.team)
            hashes = self.team.gather(lambda: {file.name: sha256(file) for file in mine})
            self.team.gather(lambda: self._complete(aside, state, hashes) if self.team.is_main else None)

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer, last_step: int | None = None) -> Progress | None:
        """Restore model, optimizer and random states from the newest valid checkpoint; None if there is none.

        A damaged one is reported and removed, and the one before it is used; likewise one of `last_step` without validation loss,
        since no step would be left to measure it. Raises `CheckpointError` for a step beyond `last_step`, and, naming the fields
        that differ, for another identity.
        """
        found = self.team.gather(lambda: self._newest_whole(last_step) if self.team.is_main else None)[0]
        if found is None:
            return None
        folder, state = found
        self._check_identity(folder, state["identity"], state["progress"]["step"])
        if last_step is not None and state["progress"]["step"] > last_step:
            raise CheckpointError(
                f"{folder} is beyond this run's last step, {last_step}: raise train.hard_stop, or use another work folder"
            )
        if self.team.is_main and state["processes"] != self.team.size:
            numbers = f"{state['processes']} processes, resumed by {self.team.size}"
            print(f"checkpoint {folder.name} is of {numbers}: what follows differs by rounding", file=sys.stderr)
        self.team.gather(lambda: _load(folder, model, optimizer, self.team.rank))
        return Progress(**state["progress"])

    def _complete(self, aside: Path, state: dict[str, Any], hashes: list[dict[str, str]]) -> None:
        """Finish a checkpoint, on the main process, once the tensors are on disk."""
        files = {name: digest for written in hashes for name, digest in written.items()}
        if missing := [name for name in files if not (aside / name).exists()]:
            raise CheckpointError(f"{aside} lacks {listed(missing)}: the folder must be one that all nodes share")
        write_json(aside / STATE, state | {"files": sorted(files)})
        write_json(aside / HASHES, {**files, STATE: sha256(aside / STATE)})
        target = self.folder / f"step-{state['progress']['step']:08d}"
        remove(target)  # not a valid checkpoint: `restore` would have resumed from it
        os.replace(aside, target)
        sync(self.folder)
        for old in self._superfluous():
            remove(old)

    @contextmanager
    def _room_for(self, tensors: dict[str, torch.Tensor], step: int, aside: Path) -> Iterator[None]:
        """On an error remove what was written; turn a full disk into an error with sizes."""
        try:
            yield
        except BaseException as error:
            if self.team.is_main:
                remove(aside)
            cause = _lack_of_room(error)
            if cause is None:
                raise
            needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
            raise DiskFullError(
                f"no room for the checkpoint of step {step}: it takes {needed:,} bytes, and the disk of {self.folder} has "
                f"{shutil.disk_usage(self.folder).free:,} free ({cause}). The checkpoints before it are whole: free some space, "
                "or move the folder to a larger disk; then the same command resumes"
            ) from None

    def _superfluous(self) -> list[Path]:
        folders = saved(self.folder)
        kept = {*folders[-self.keep :], *(folder for folder in folders if self.milestone(step_of(folder)))}
        losses = {folder: loss for folder in folders if (loss := _valid_loss(folder)) is not None}
        if losses:
            kept.add(min(losses, key=losses.__getitem__))
        return [folder for folder in folders if folder not in kept]

    def _newest_whole(self, last_step: int | None) -> tuple[Path, dict[str, Any]] | None:
        for folder in reversed(saved(self.folder)):
            try:
                state = verify(folder)
                if step_of(folder) == last_step and state["valid_loss"] is None:
                    raise DamagedError("the validation of the last step is missing")
                return folder, state
            except DamagedError as error:
                print(f"checkpoint {folder.name} is damaged or incomplete, going back to the one before: {error}", file=sys.stderr)
                remove(folder)
        return None

    def _check_identity(self, folder: Path, saved: Mapping[str, Any], step: int) -> None:
        """Settings that only affect later steps may differ, with `resume: compatible` also those that change rounding."""
        if differences := incompatible_fields(saved, self.identity, step):
            changes = listed(f"{key} was {then} and is {now}" for key, (then, now) in differences.items())
            raise CheckpointError(f"{folder} is a checkpoint of another run: {changes}; remove {folder.parent} to start again")
        inexact = rounding_fields(saved, self.identity)
        if inexact and self.identity.get("train", {}).get("resume") != "compatible":
            changes = listed(f"{key} was {then} and is {now}" for key, (then, now) in inexact.items())
            raise CheckpointError(
                f"{folder} differs from this run by rounding: {changes}; set it back, allow it with train.resume = compatible, or "
                f"remove {folder.parent} to start again"
            )


def _lack_of_room(error: BaseException) -> BaseException | None:
    """The error that reports a full disk, in any of the forms that writers raise; None for any other error."""
    if isinstance(error, OSError):
        return error if error.errno in NO_ROOM else None
    if isinstance(error, SafetensorError):
        return error if any(f"os error {number}" in str(error) for number in NO_ROOM) else None
    failures = (failure for failure, _ in getattr(error, "failures", {}).values())  # from the processes of a team
    return next(filter(None, map(_lack_of_room, failures)), None)


def _make_empty(folder: Path) -> None:
    remove(folder)  # left by a killed process
    folder.mkdir(parents=True)


def _write(aside: Path, tensors: dict[str, torch.Tensor], team: ProcessGroup) -> list[Path]:
    """Write each tensor once, however many processes hold it; return the files written by this process."""
    if team.size == 1:
        save_tensors(tensors, aside / TENSORS)
        sync(aside / TENSORS)
        return [aside / TENSORS]
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    save(tensors, storage_writer=HuggingFaceStorageWriter(str(aside), save_distributed=True))  # synced by the writer
    return list(aside.glob(f"shard-{team.rank + 1:05d}-*"))


def _load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, rank: int) -> None:
    """Load this process's part: weights in place, optimizer state and random states."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = HuggingFaceStorageReader(str(folder))
    saved: dict[str, Any] = reader.read_metadata().state_dict_metadata
    _make_state(model, optimizer, {path: (meta.size, meta.properties.dtype) for path, meta in saved.items()})
    random = {path: state for path, state in _random_states(model, rank).items() if path in saved}
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # about loading in a single process, as intended
        load({**_weights(model), **_optimizer_state(model, optimizer), **random}, storage_reader=reader, no_dist=True)
    _set_random_states(random)


def _check_finite(model: nn.Module, step: int, valid_loss: float | None) -> None:
    if valid_loss is not None and not math.isfinite(valid_loss):
        raise NonFiniteError(f"step {step}: the validation loss is {valid_loss}; the checkpoint before it stays the last one")
    for name, parameter in model.named_parameters():
        weight = _local(parameter)
        if not torch.isfinite(weight.sum()) and not torch.isfinite(weight).all():  # the sum is fast, and may overflow
            raise NonFiniteError(f"step {step}: {name} is not finite; the checkpoint before it stays the last one")


def _local(tensor: Any) -> torch.Tensor:
    """This process's part of a tensor that may be sharded."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _valid_loss(folder: Path) -> float | None:
    """The validation loss of a saved step; None if it was not measured or the state is damaged."""
    try:
        return read_state(folder)["valid_loss"]
    except DamagedError:
        return None


def _weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers as `model/name`; one with several names, such as a tied head, is saved under its first."""
    names: dict[int, str] = {}
    tensors = model.state_dict(keep_vars=True).items()
    return {f"model/{name}": tensor.detach() for name, tensor in tensors if names.setdefault(id(tensor), name) == name}


def _optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimizer's state as `optimizer/parameter/key`. Its settings are not included: they are part of the identity."""
    return {
        f"optimizer/{name}/{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _make_state(model: nn.Module, optimizer: torch.optim.Optimizer, saved: dict[str, tuple[torch.Size, torch.dtype]]) -> None:
    """Allocate optimizer state with the saved shapes and types, to be loaded into.

    State with its parameter's shape is sharded like the parameter. The device of step counts follows the optimizer's rule.
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
    """The states of this process's random generators, as `random/rank/device`."""
    device = next(model.parameters()).device.type
    states = {f"random/{rank}/cpu": torch.get_rng_state()}
    if device in GPU_RANDOM:
        states[f"random/{rank}/{device}"] = GPU_RANDOM[device][0]()
    return states


def _set_random_states(states: dict[str, torch.Tensor]) -> None:
    for path, state in states.items():
        device = path.rpartition("/")[2]
        GPU_RANDOM[device][1](state) if device in GPU_RANDOM else torch.set_rng_state(state)
