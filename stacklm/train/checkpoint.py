"""Checkpoints: all a run needs to go on exactly as if it had never stopped.

One folder each, `step-00000050/`: weights, optimizer state and random states as safetensors, the rest as JSON (nothing
that can run code when read), and the SHA-256 of every file. A folder is written aside, synced and renamed, so a
checkpoint is there in full or not at all; what the disk did to it since, the hashes tell.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn

from stacklm.config.schema import listed
from stacklm.files import read_json, remove, sha256, sync, write_json

MODEL, OPTIMIZER, RANDOM, STATE, HASHES = (
    "model.safetensors",
    "optimizer.safetensors",
    "random.safetensors",
    "state.json",
    "hashes.json",
)
GPU_RANDOM = {
    "cuda": (torch.cuda.get_rng_state, torch.cuda.set_rng_state),
    "mps": (torch.mps.get_rng_state, torch.mps.set_rng_state),
}


class CheckpointError(RuntimeError):
    """A checkpoint of another run: of another architecture, data or other settings."""


class _Damaged(Exception):
    """A checkpoint whose files are not what was written."""


@dataclass(frozen=True)
class Progress:
    """How far a run has come: optimizer steps, tokens and seconds of training, resumes added up."""

    step: int
    tokens: int
    seconds: float


class Checkpoints:
    """The last `keep` checkpoints of a run, in `folder`.

    `identity` is a plain mapping of all that makes the run what it is; only a checkpoint of an equal one is resumed.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], keep: int) -> None:
        self.folder, self.identity, self.keep = folder, identity, keep

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
        """Write the checkpoint of this step, then remove the oldest beyond `keep`."""
        target = self.folder / f"step-{progress.step:08d}"
        aside = self.folder / ".writing"
        remove(aside)  # left by a kill
        aside.mkdir(parents=True)
        save_model(model, str(aside / MODEL))
        save_file(_optimizer_tensors(model, optimizer), aside / OPTIMIZER)
        save_file(_random_states(model), aside / RANDOM)
        write_json(aside / STATE, {"progress": asdict(progress), "identity": self.identity})
        for file in (MODEL, OPTIMIZER, RANDOM):
            sync(aside / file)
        write_json(aside / HASHES, {file: sha256(aside / file) for file in (MODEL, OPTIMIZER, RANDOM, STATE)})
        os.replace(aside, target)
        sync(self.folder)
        for old in self._saved()[: -self.keep]:
            remove(old)

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Progress | None:
        """Bring model, optimizer and random states to the newest whole checkpoint; None where there is none.

        A damaged one is reported, removed and passed over for the one before. Raises `CheckpointError`, naming the
        fields that differ, for one of another identity.
        """
        for folder in reversed(self._saved()):
            try:
                _verify(folder)
            except _Damaged as error:
                print(f"checkpoint {folder.name} is damaged, going back to the one before: {error}", file=sys.stderr)
                remove(folder)
                continue
            state = read_json(folder / STATE)
            self._check_identity(folder, state["identity"])
            load_model(model, folder / MODEL)
            _load_optimizer(model, optimizer, load_file(folder / OPTIMIZER))
            _set_random_states(model, load_file(folder / RANDOM))
            return Progress(**state["progress"])
        return None

    def _saved(self) -> list[Path]:
        return sorted(self.folder.glob("step-*"))

    def _check_identity(self, folder: Path, saved: Mapping[str, Any]) -> None:
        then, now = _flat(saved), _flat(self.identity)
        differing = [key for key in {**then, **now} if then.get(key) != now.get(key)]
        if differing:
            changes = listed(f"{key} was {then.get(key)} and is {now.get(key)}" for key in differing)
            raise CheckpointError(f"{folder} is a checkpoint of another run: {changes}; remove {folder.parent} to start anew")


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


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimizer's state as `parameter/key`. Settings are not in it: they are part of the identity."""
    return {
        f"{name}/{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    name_of = {parameter: name for name, parameter in model.named_parameters()}
    order = [name_of[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, torch.Tensor]] = {}
    for path, tensor in tensors.items():
        name, _, key = path.rpartition("/")
        state.setdefault(order.index(name), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _random_states(model: nn.Module) -> dict[str, torch.Tensor]:
    device = next(model.parameters()).device.type
    states = {"cpu": torch.get_rng_state()}
    if device in GPU_RANDOM:
        states[device] = GPU_RANDOM[device][0]()
    return states


def _set_random_states(model: nn.Module, states: dict[str, torch.Tensor]) -> None:
    device = next(model.parameters()).device.type
    torch.set_rng_state(states["cpu"])
    if device in GPU_RANDOM and device in states:
        GPU_RANDOM[device][1](states[device])


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one of dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
