from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from stacklm.files import read_json
from stacklm.train.checkpoint import CheckpointError, Checkpoints, Progress

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


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "random.safetensors", "state.json"])
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


@pytest.mark.parametrize("file", ["model.safetensors", "hashes.json"])
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


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states = save_steps(tmp_path, 1)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    training = Training()
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr("stacklm.train.checkpoint.save_file", full)
        Checkpoints(tmp_path, IDENTITY, 2).save(training.model, training.optimizer, Progress(2, 16, 1.0))
    progress, training = restore(tmp_path)
    assert progress.step == 1
    assert equal(training.state(), states[1])
    Checkpoints(tmp_path, IDENTITY, 2).save(training.model, training.optimizer, Progress(2, 16, 1.0))
    assert restore(tmp_path)[0].step == 2  # what was left half-written is in nobody's way
