from __future__ import annotations

import math
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from stacklm.files import read_json, sha256, write_json
from stacklm.train import CheckpointError, DiskFullError, NonFiniteError
from stacklm.train.checkpoint import Checkpoints, Progress

IDENTITY = {"train": {"max_steps": 9, "seed": 1}, "model": {"kind": "dense"}, "data": "abc"}


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


def save(folder: Path, step: int, valid_loss: float | None = None, training: Training | None = None) -> None:
    training = training or Training()
    checkpoints = Checkpoints(folder, IDENTITY, 2, milestone=lambda step: step % 4 == 0)
    checkpoints.save(training.model, training.optimizer, Progress(step, 8 * step, 0.5 * step), valid_loss)


def save_steps(folder: Path, count: int) -> dict[int, list[torch.Tensor]]:
    """Checkpoints of steps 1 to `count`, and the states they should hold."""
    training, states = Training(), {}
    for step in range(1, count + 1):
        training.step()
        states[step] = training.state()
        save(folder, step, training=training)
    return states


def restore(folder: Path, identity: dict = IDENTITY, last_step: int | None = None) -> tuple[Progress | None, Training]:
    training = Training()
    torch.manual_seed(99)
    return Checkpoints(folder, identity, 2).restore(training.model, training.optimizer, last_step), training


def equal(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> bool:
    return len(found) == len(wanted) and all(map(torch.equal, found, wanted))


def assert_restored(folder: Path, step: int, states: dict[int, list[torch.Tensor]]) -> None:
    progress, training = restore(folder)
    assert progress == Progress(step, 8 * step, 0.5 * step)
    assert equal(training.state(), states[step])


def saved(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in folder.iterdir())


def test_everything_comes_back_and_training_goes_on_alike(tmp_path: Path) -> None:
    states = save_steps(tmp_path, 3)
    assert_restored(tmp_path, 3, states)
    _, training = restore(tmp_path)
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
    save(tmp_path, 0, training=training)
    assert_restored(tmp_path, 0, {0: training.state()})
    restore(tmp_path)[1].step()


def test_the_last_ones_are_kept(tmp_path: Path) -> None:
    training = Training()
    for step in range(1, 13):
        Checkpoints(tmp_path, IDENTITY, keep=3).save(training.model, training.optimizer, Progress(step, 8 * step, 0.5 * step))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010", "step-00000011", "step-00000012"]


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def rehash(change: Callable[[dict], object]) -> Callable[[Path], object]:
    """Change the state of a checkpoint, and its hash with it."""

    def damage(folder: Path) -> None:
        state = read_json(folder / "state.json")
        change(state)
        write_json(folder / "state.json", state)
        write_json(folder / "hashes.json", read_json(folder / "hashes.json") | {"state.json": sha256(folder / "state.json")})

    return damage


def hashes_of(*kept: str) -> Callable[[Path], object]:
    return lambda folder: write_json(folder / "hashes.json", {name: sha256(folder / name) for name in kept})


def hashes(value: object) -> Callable[[Path], object]:
    return lambda folder: write_json(folder / "hashes.json", value)


BOTH = "state.json, tensors.safetensors"
ANOTHER = "../step-00000001/tensors.safetensors"
WRONG = "missing or wrong "
WRONG_STATES: list[tuple[str, Callable[[dict], object]]] = [
    ("progress is not an object", lambda state: state.pop("progress")),
    ("progress is not an object", lambda state: state["progress"].pop("step")),
    ("progress is not an object", lambda state: state["progress"].update(epochs=1)),
    *((WRONG + "progress.step", lambda state, step=step: state["progress"].update(step=step)) for step in (1, "2", True)),
    (WRONG + "progress.seconds", lambda state: state["progress"].update(seconds=-1.0)),
    (WRONG + "valid_loss", lambda state: state.update(valid_loss="low")),
    (WRONG + "valid_loss", lambda state: state.pop("valid_loss")),
    (WRONG + "processes", lambda state: state.update(processes=0)),
    (WRONG + "identity", lambda state: state.pop("identity")),
    (WRONG + "identity", lambda state: state.update(identity=[])),
    *((WRONG + "files", lambda state, files=files: state.update(files=files)) for files in ([], [ANOTHER])),
]
DAMAGE: list[tuple[str, Callable[[Path], object]]] = [
    ("tensors.safetensors has SHA-256 ", lambda folder: flip_a_bit(folder / "tensors.safetensors")),
    ("state.json has SHA-256 ", lambda folder: flip_a_bit(folder / "state.json")),
    ("tensors.safetensors is missing", lambda folder: (folder / "tensors.safetensors").unlink()),
    ("hashes.json is missing", lambda folder: (folder / "hashes.json").unlink()),
    ("hashes.json cannot be read", lambda folder: (folder / "hashes.json").write_text('{"model.saf')),
    (f"hashes.json is about no file, not {BOTH}", hashes_of()),
    (f"hashes.json is about state.json, not {BOTH}", hashes_of("state.json")),
    (f"hashes.json is about tensors.safetensors, not {BOTH}", hashes_of("tensors.safetensors")),
    *(("hashes.json is not a JSON object", hashes(value)) for value in ([], None, 7)),
    ("state.json has SHA-256 ", hashes({"state.json": 7})),
    (f"{ANOTHER} is missing", hashes({ANOTHER: "0"})),
    (
        "another.safetensors was not written with it",
        lambda folder: shutil.copyfile(folder.with_name("step-00000001") / "tensors.safetensors", folder / "another.safetensors"),
    ),
    *((f"state.json: {message}", rehash(change)) for message, change in WRONG_STATES),
]


@pytest.mark.parametrize(("message", "damage"), DAMAGE, ids=[message for message, _ in DAMAGE])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    tmp_path: Path, message: str, damage: Callable[[Path], object], capsys: pytest.CaptureFixture[str]
) -> None:
    states = save_steps(tmp_path, 2)
    newest = tmp_path / "step-00000002"
    damage(newest)
    assert_restored(tmp_path, 1, states)
    assert f"step-00000002 is damaged or incomplete, going back to the one before: {message}" in capsys.readouterr().err
    assert not newest.exists()


def test_what_else_lies_there_is_left_alone(tmp_path: Path) -> None:
    states = save_steps(tmp_path, 2)
    strays = ["step-foo", "step-00000050.tmp", "step-1e9", "step-", ".DS_Store", "notes.txt"]
    for name in strays[:3]:
        shutil.copytree(tmp_path / "step-00000001", tmp_path / name)
    for name in [*strays[3:], "step-00000003", "step-00000099"]:
        (tmp_path / name).write_text("stray")
    (tmp_path / "step-00000002" / ".DS_Store").write_text("stray")
    assert_restored(tmp_path, 2, states)
    save(tmp_path, 3, valid_loss=1.0)
    assert restore(tmp_path)[0].step == 3
    assert {path.name for path in tmp_path.iterdir()} == {*strays, "step-00000002", "step-00000003", "step-00000099"}


def test_files_hold_no_code_and_have_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    save_steps(tmp_path, 1)
    (tmp_path / "new").touch()
    files = list((tmp_path / "step-00000001").iterdir())
    assert {path.suffix for path in files} == {".safetensors", ".json"}
    assert {path.stat().st_mode for path in files} == {(tmp_path / "new").stat().st_mode}


def test_a_step_beyond_the_last_one_is_refused(tmp_path: Path) -> None:
    save_steps(tmp_path, 3)
    with pytest.raises(CheckpointError, match=r"step-00000003 is beyond this run's last step, 2: raise train.hard_stop, or use"):
        restore(tmp_path, last_step=2)
    assert saved(tmp_path) == [2, 3]


def test_the_last_step_is_made_again_where_its_validation_is_missing(tmp_path: Path) -> None:
    save_steps(tmp_path, 3)
    assert restore(tmp_path, last_step=3)[0].step == 2
    save(tmp_path, 3, valid_loss=1.0)
    assert restore(tmp_path, last_step=3)[0].step == 3


def test_what_differs_by_rounding_must_be_allowed_and_no_more_can_be(tmp_path: Path) -> None:
    def identity(**train: object) -> dict:
        return {"train": {"micro_batch_size": 4, "precision": "fp32", "resume": "bitwise"} | train}

    training = Training()
    Checkpoints(tmp_path, identity(), 1).save(training.model, training.optimizer, Progress(1, 8, 0.5))
    with pytest.raises(CheckpointError, match=r"by rounding: train.micro_batch_size was 4 and is 2; set it back, allow it with"):
        restore(tmp_path, identity(micro_batch_size=2))
    assert restore(tmp_path, identity(micro_batch_size=2, resume="compatible"))[0].step == 1
    for resume in ("bitwise", "compatible"):
        with pytest.raises(CheckpointError, match=r"another run: train.precision was fp32 and is bf16"):
            restore(tmp_path, identity(precision="bf16", resume=resume))


def test_all_damaged_means_from_the_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_steps(tmp_path, 2)
    for folder in tmp_path.iterdir():
        flip_a_bit(folder / "state.json")
    assert restore(tmp_path)[0] is None
    assert capsys.readouterr().err.count("is damaged") == 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"data": "def"}, "data was abc and is def"),
        (
            {"train": {"max_steps": 9, "seed": 2}, "model": {"kind": "stacked", "d_model": 8}},
            "train.seed was 1 and is 2, model.kind was dense and is stacked, model.d_model was None and is 8",
        ),
    ],
)
def test_another_runs_checkpoint_is_refused_with_the_fields_that_differ(tmp_path: Path, change: dict, said: str) -> None:
    save_steps(tmp_path, 1)
    with pytest.raises(CheckpointError, match=f"another run: {said}; remove"):
        restore(tmp_path, IDENTITY | change)


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
    with pytest.raises(DiskFullError, match=r"of step 2: it takes 5,172 bytes, and the disk of .*/disk has 4,096 free.* resumes"):
        save(small_disk, 2)
    assert sorted(path.name for path in small_disk.iterdir()) == ["other", "step-00000001"]
    assert_restored(small_disk, 1, states)
    (small_disk / "other").unlink()
    save(small_disk, 2)
    assert restore(small_disk)[0].step == 2


@pytest.mark.skipif(os.name == "nt", reason="Windows has no limit on the size of files")
def test_a_file_that_may_not_grow_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    import resource

    states = save_steps(tmp_path, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(DiskFullError, match="of step 2: it takes"):
            save(tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert_restored(tmp_path, 1, states)


def test_the_best_and_the_milestones_are_kept_too(tmp_path: Path) -> None:
    training = Training()
    for step, loss in enumerate([3.0, 2.0, None, 2.5, 2.0, None, 2.25, None, None], start=1):
        save(tmp_path, step, loss, training=training)
    assert saved(tmp_path) == [2, 4, 8, 9]
    for step, loss in enumerate([1.75, None, 1.8, 1.9], start=10):
        save(tmp_path, step, loss, training=training)
    assert saved(tmp_path) == [4, 8, 10, 12, 13]
    assert restore(tmp_path)[0].step == 13


def test_a_damaged_state_keeps_no_other_from_being_saved(tmp_path: Path) -> None:
    save_steps(tmp_path, 2)
    (tmp_path / "step-00000001" / "state.json").write_text("[")
    save(tmp_path, 3, valid_loss=1.0)
    assert saved(tmp_path) == [2, 3]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_not_saved(tmp_path: Path, value: float) -> None:
    states, training = save_steps(tmp_path, 1), Training()
    with pytest.raises(NonFiniteError, match=rf"step 2: the validation loss is {value}"):
        save(tmp_path, 2, valid_loss=value)
    with torch.no_grad():
        training.model.embedding.weight[3, 1] = value
    with pytest.raises(NonFiniteError, match=r"step 2: embedding\.weight is not finite"):
        save(tmp_path, 2, training=training)
    assert_restored(tmp_path, 1, states)


def test_finite_weights_whose_sum_overflows_are_saved(tmp_path: Path) -> None:
    training = Training()
    torch.nn.init.constant_(training.model.norm.weight, 3e38)
    save(tmp_path, 1, training=training)
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
    save(tmp_path, 1, training=training)
    _, restored = restore(tmp_path)
    found = restored.optimizer.state[restored.model.norm.weight]
    assert found.keys() == state.keys()
    assert all(found[key].dtype == value.dtype and torch.equal(found[key], value) for key, value in state.items())


@pytest.mark.parametrize("error", [RuntimeError("something else"), KeyboardInterrupt(), OSError(5, "a broken disk")], ids=repr)
def test_an_error_that_is_not_about_room_stays_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("stacklm.train.checkpoint.save_tensors", fail)
    with pytest.raises(type(error)) as raised:
        save_steps(tmp_path, 1)
    assert raised.value is error
