from __future__ import annotations

import math
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from stacklm.files import read_json
from stacklm.train.checkpoint import Checkpoints, Progress
from stacklm.train.errors import CheckpointError, DiskFullError, NonFiniteError

IDENTITY = {"train": {"steps": 9, "seed": 1}, "model": {"kind": "dense"}, "data": "abc"}


class Tied(nn.Module):
    """A model with a weight used twice, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.norm = nn.BatchNorm1d(3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids_T: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.embedding(ids_T)))


class Training:
    """A model with its optimizer, trained on random tokens: each step depends on all that a checkpoint must hold."""

    def __init__(self) -> None:
        self.model = Tied()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1, fused=True)

    def step(self) -> None:
        ids_T = torch.randint(5, (8,))
        nn.functional.cross_entropy(self.model(ids_T), ids_T.roll(-1)).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state(self) -> list[torch.Tensor]:
        states = [self.optimizer.state[parameter] for parameter in self.model.parameters()]
        moments = [state[key] for state in states for key in sorted(state)]
        return [tensor.clone() for tensor in (*self.model.state_dict().values(), *moments, torch.get_rng_state())]


def save_steps(folder: Path, count: int, keep: int = 2) -> dict[int, list[torch.Tensor]]:
    """Checkpoints of steps 1 to `count`, and the states they should hold."""
    training, states = Training(), {}
    for step in range(1, count + 1):
        training.step()
        states[step] = training.state()
        Checkpoints(folder, IDENTITY, keep).save(training.model, training.optimizer, Progress(step, 8 * step, 0.5 * step))
    return states


def restore(folder: Path, identity: dict = IDENTITY) -> tuple[Progress | None, Training]:
    training = Training()
    torch.manual_seed(99)
    return Checkpoints(folder, identity, 2).restore(training.model, training.optimizer), training


def equal(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> bool:
    return len(found) == len(wanted) and all(map(torch.equal, found, wanted))


def saved(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in folder.iterdir())


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_everything_comes_back_and_training_goes_on_alike(tmp_path: Path) -> None:
    states = save_steps(tmp_path, 3)
    progress, training = restore(tmp_path)
    assert progress == Progress(3, 24, 1.5)
    assert equal(training.state(), states[3])
    training.step()
    _, other = restore(tmp_path)
    other.step()
    assert equal(training.state(), other.state())


def test_nothing_to_restore(tmp_path: Path) -> None:
    progress, training = restore(tmp_path / "absent")
    assert progress is None
    assert not training.optimizer.state


def test_a_checkpoint_before_the_first_update(tmp_path: Path) -> None:
    training = Training()
    Checkpoints(tmp_path, IDENTITY, 1).save(training.model, training.optimizer, Progress(0, 0, 0.0))
    wanted = training.state()
    progress, restored = restore(tmp_path)
    assert progress == Progress(0, 0, 0.0)
    assert equal(restored.state(), wanted)
    restored.step()


def test_the_last_ones_are_kept(tmp_path: Path) -> None:
    save_steps(tmp_path, 12, keep=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010", "step-00000011", "step-00000012"]


def test_files_hold_no_code(tmp_path: Path) -> None:
    save_steps(tmp_path, 1)
    assert {path.suffix for path in (tmp_path / "step-00000001").iterdir()} == {".safetensors", ".json"}


@pytest.mark.parametrize("file", ["tensors.safetensors", "state.json"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path: Path, file: str, capsys: pytest.CaptureFixture[str]) -> None:
    states = save_steps(tmp_path, 2)
    newest = tmp_path / "step-00000002"
    written = read_json(newest / "hashes.json")[file]
    flip_a_bit(newest / file)
    progress, training = restore(tmp_path)
    assert progress.step == 1
    assert equal(training.state(), states[1])
    message = capsys.readouterr().err
    assert f"step-00000002 is damaged, going back to the one before: {file} has SHA-256 " in message
    assert written in message
    assert not newest.exists()


@pytest.mark.parametrize("file", ["tensors.safetensors", "hashes.json"])
def test_a_missing_file_is_damage(tmp_path: Path, file: str, capsys: pytest.CaptureFixture[str]) -> None:
    save_steps(tmp_path, 2)
    (tmp_path / "step-00000002" / file).unlink()
    progress, _ = restore(tmp_path)
    assert progress.step == 1
    assert f"{file} is missing" in capsys.readouterr().err


def test_damaged_hashes_are_damage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_steps(tmp_path, 2)
    (tmp_path / "step-00000002" / "hashes.json").write_text('{"model.saf')
    progress, _ = restore(tmp_path)
    assert progress.step == 1
    assert "hashes.json cannot be read" in capsys.readouterr().err


def test_all_damaged_means_from_the_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_steps(tmp_path, 2)
    for folder in tmp_path.iterdir():
        flip_a_bit(folder / "state.json")
    assert restore(tmp_path)[0] is None
    assert capsys.readouterr().err.count("is damaged") == 2


def test_another_runs_checkpoint_is_refused_with_the_fields_that_differ(tmp_path: Path) -> None:
    save_steps(tmp_path, 1)
    other = {"train": {"steps": 9, "seed": 2}, "model": {"kind": "stacked", "width": 8}, "data": "abc"}
    with pytest.raises(CheckpointError) as error:
        restore(tmp_path, other)
    assert "train.seed was 1 and is 2, model.kind was dense and is stacked, model.width was None and is 8; remove" in str(
        error.value
    )
    assert "steps" not in str(error.value)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    if mount is None or subprocess.run([mount, "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("a small file system can be mounted by the administrator of a Linux machine only")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_leaves_the_old_checkpoint(small_disk: Path) -> None:
    states = save_steps(small_disk, 1)  # it takes three blocks and a bit: 16 kB
    (small_disk / "other").write_bytes(bytes(45_056))
    training = Training()
    with pytest.raises(DiskFullError, match=r"of step 2: it takes 5,172 bytes, and the disk of .*/disk has 4,096 free") as error:
        Checkpoints(small_disk, IDENTITY, 2).save(training.model, training.optimizer, Progress(2, 16, 1.0))
    assert "the same command goes on" in str(error.value)
    assert sorted(path.name for path in small_disk.iterdir()) == ["other", "step-00000001"]
    progress, training = restore(small_disk)
    assert progress.step == 1
    assert equal(training.state(), states[1])
    (small_disk / "other").unlink()
    Checkpoints(small_disk, IDENTITY, 2).save(training.model, training.optimizer, Progress(2, 16, 1.0))
    assert restore(small_disk)[0].step == 2


@pytest.mark.skipif(os.name == "nt", reason="Windows has no limit on the size of files")
def test_a_file_that_may_not_grow_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    import resource

    states = save_steps(tmp_path, 1)
    training = Training()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(DiskFullError, match="of step 2: it takes"):
            Checkpoints(tmp_path, IDENTITY, 2).save(training.model, training.optimizer, Progress(2, 16, 1.0))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    progress, training = restore(tmp_path)
    assert progress.step == 1
    assert equal(training.state(), states[1])


def test_the_best_and_the_milestones_are_kept_too(tmp_path: Path) -> None:
    training = Training()
    for step, loss in enumerate([3.0, 2.0, None, 2.5, 2.0, None, 2.25, None, None], start=1):
        checkpoints = Checkpoints(tmp_path, IDENTITY, keep=2, milestone=lambda step: step % 4 == 0)
        checkpoints.save(training.model, training.optimizer, Progress(step, 0, 0.0), valid_loss=loss)
    assert saved(tmp_path) == [2, 4, 8, 9]
    checkpoints.save(training.model, training.optimizer, Progress(10, 0, 0.0), valid_loss=1.75)
    checkpoints.save(training.model, training.optimizer, Progress(11, 0, 0.0), valid_loss=None)
    checkpoints.save(training.model, training.optimizer, Progress(12, 0, 0.0), valid_loss=1.8)
    checkpoints.save(training.model, training.optimizer, Progress(13, 0, 0.0), valid_loss=1.9)
    assert saved(tmp_path) == [4, 8, 10, 12, 13]
    assert restore(tmp_path)[0].step == 13


def test_a_damaged_note_is_in_nobodys_way(tmp_path: Path) -> None:
    save_steps(tmp_path, 2)
    (tmp_path / "step-00000001" / "state.json").write_text("[")
    training = Training()
    Checkpoints(tmp_path, IDENTITY, 2).save(training.model, training.optimizer, Progress(3, 0, 0.0), valid_loss=1.0)
    assert saved(tmp_path) == [2, 3]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_not_saved(tmp_path: Path, value: float) -> None:
    states = save_steps(tmp_path, 1)
    training = Training()
    checkpoints = Checkpoints(tmp_path, IDENTITY, keep=1)
    with pytest.raises(NonFiniteError, match=rf"step 2: the validation loss is {value}"):
        checkpoints.save(training.model, training.optimizer, Progress(2, 0, 0.0), valid_loss=value)
    with torch.no_grad():
        training.model.embedding.weight[3, 1] = value
    with pytest.raises(NonFiniteError, match=r"step 2: embedding\.weight is not finite"):
        checkpoints.save(training.model, training.optimizer, Progress(2, 0, 0.0))
    progress, restored = restore(tmp_path)
    assert progress.step == 1
    assert equal(restored.state(), states[1])


def test_finite_weights_whose_sum_overflows_are_saved(tmp_path: Path) -> None:
    training = Training()
    torch.nn.init.constant_(training.model.norm.weight, 3e38)
    Checkpoints(tmp_path, IDENTITY, keep=1).save(training.model, training.optimizer, Progress(1, 0, 0.0))
    assert saved(tmp_path) == [1]


def test_every_type_of_state_comes_back(tmp_path: Path) -> None:
    """Optimizers may keep their state in fewer bits than the weights, and in other shapes."""
    training = Training()
    parameter = training.model.norm.weight
    state = {
        "step": torch.tensor(7, dtype=torch.int64),
        "bytes": torch.arange(3, dtype=torch.uint8),
        "half": torch.randn(3).bfloat16(),
        "double": torch.randn(2, 1).double(),
        "flag": torch.tensor([True, False]),
        "none": torch.empty(0, 4),
    }
    training.optimizer.state[parameter] = dict(state)
    Checkpoints(tmp_path, IDENTITY, keep=1).save(training.model, training.optimizer, Progress(1, 0, 0.0))
    _, restored = restore(tmp_path)
    found = restored.optimizer.state[restored.model.norm.weight]
    assert found.keys() == state.keys()
    assert all(found[key].dtype == value.dtype and torch.equal(found[key], value) for key, value in state.items())
