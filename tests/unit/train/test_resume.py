"""The checkpoint of earlier runs from which a run starts, and its rows; the runs themselves are in `tests/integration/train`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from stacklm.config.schema import plain
from stacklm.config.train import Train
from stacklm.files import read_json, read_jsonl, write_jsonl
from stacklm.train.checkpoint import Checkpoints, Progress
from stacklm.train.metrics import row_every
from stacklm.train.resume import warm_start
from support.train_files import MODELS, TRAIN

WSD = replace(TRAIN, lr_schedule="wsd", decay_fraction=0.5, max_steps=2000, hard_stop=12)


def identity_of(config: Train, **others: Any) -> dict[str, Any]:
    return {"train": plain(config), "model": plain(MODELS["dense"]), "data": "5f"} | others


def write_run(work: Path, config: Train = TRAIN, steps: tuple[int, ...] = (0, 5, 10, 15), last: int = 17, **others: Any) -> Path:
    """What a run leaves that was stopped after step `last`: checkpoints of those steps, and rows, with a validation at its end."""
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    for step in steps:
        Checkpoints(work / "checkpoints", identity_of(config, **others), 99).save(model, optimizer, Progress(step, step, step))
    metrics = [{"step": step, "train_loss": 1 / (step + 1)} for step in range(0, last + 1, row_every(config.max_steps))]
    for row in metrics:
        if row["step"] % config.eval_every == 0 or row["step"] == last:
            row |= {"valid_loss": 2.0, "valid_bits_per_byte": 1.0, "health/entropy": 3.0}
    write_jsonl(work / "metrics.jsonl", metrics)
    write_jsonl(work / "timing.jsonl", [{"step": row["step"], "seconds": row["step"]} for row in metrics])
    return work


def adopted(work: Path, earlier: list[Path], config: Train = TRAIN, **others: Any) -> int | None:
    """The step that a new run starts from."""
    warm_start(work, earlier, identity_of(config, **others), config)
    found = list((work / "checkpoints").glob("*"))
    assert len(found) <= 1
    return int(found[0].name.removeprefix("step-")) if found else None


def test_the_newest_checkpoint_of_all_earlier_runs_is_taken_with_the_rows_up_to_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = write_run(tmp_path / "old", steps=(0, 5)), write_run(tmp_path / "new")
    assert adopted(tmp_path / "work", [new, tmp_path / "no run", old]) == 15
    files = {path.name: path.read_bytes() for path in (new / "checkpoints/step-00000015").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "work/checkpoints/step-00000015").iterdir()} == files
    assert read_jsonl(tmp_path / "work/metrics.jsonl") == read_jsonl(new / "metrics.jsonl")[:16]
    timing = read_jsonl(new / "timing.jsonl")[:16]
    timing[-1]["goes_on_from"] = "new, step 15"
    assert read_jsonl(tmp_path / "work/timing.jsonl") == timing
    assert "step 15" in capsys.readouterr().out


def test_one_of_the_very_last_step_is_taken_only_with_its_validation(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=(5, 10, 12))
    assert adopted(tmp_path / "without", [run], replace(TRAIN, hard_stop=10)) == 5
    assert adopted(tmp_path / "with", [run], replace(TRAIN, hard_stop=12)) == 12


def test_a_run_with_a_checkpoint_of_its_own_is_left_alone(tmp_path: Path) -> None:
    own = write_run(tmp_path / "own", steps=(5,), last=5)
    before = (own / "metrics.jsonl").read_bytes()
    assert adopted(own, [write_run(tmp_path / "run")]) == 5
    assert (own / "metrics.jsonl").read_bytes() == before


OTHER = [{"seed": 2}, {"precision": "bf16"}, {"warmup_steps": 7}, {"max_grad_norm": 2.0}, {"eval_every": 12}, {"eval_tokens": 50}]


@pytest.mark.parametrize(
    ("changes", "others", "step"),
    [
        ({}, {}, 15),
        ({"hard_stop": 12}, {}, 10),
        ({"hard_stop": 4}, {}, None),  # only the untrained model would be left
        ({"micro_batch_size": 2}, {}, None),
        ({"micro_batch_size": 2, "resume": "compatible"}, {}, 15),
        *(({"resume": "compatible", **change}, {}, None) for change in OTHER),
        ({}, {"data": "60"}, None),
        ({}, {"model": plain(MODELS["stacked"])}, None),
    ],
    ids=str,
)
def test_the_newest_checkpoint_of_an_identical_run_is_taken(tmp_path: Path, changes: dict, others: dict, step: int | None) -> None:
    """One that differs by rounding must be allowed; one of other settings, rows, model or data never is."""
    run = write_run(tmp_path / "run")
    assert adopted(tmp_path / "work", [run], replace(TRAIN, **changes), **others) == step
    assert (tmp_path / "work").exists() == (step is not None)


@pytest.mark.parametrize("damage", ["tensors.safetensors", "hashes.json", "metrics.jsonl", "timing.jsonl"])
def test_what_is_damaged_gives_way_to_what_is_whole(tmp_path: Path, damage: str) -> None:
    run = write_run(tmp_path / "run")
    if damage.endswith(".jsonl"):  # without the row of step 12
        lines = (run / damage).read_text().splitlines(keepends=True)
        (run / damage).write_text("".join(lines[:12] + lines[13:]))
    else:
        (run / "checkpoints/step-00000015" / damage).write_bytes(b"{}")
    assert adopted(tmp_path / "work", [run]) == 10


def test_the_rows_are_those_that_the_run_would_have_written(tmp_path: Path) -> None:
    """The earlier run validated at its own end, step 11, where this one does not; with half as many rows this has each second."""
    run = write_run(tmp_path / "run", steps=(11,), last=11)
    assert adopted(tmp_path / "work", [run]) == 11
    wanted = read_jsonl(run / "metrics.jsonl")
    assert wanted.pop() == {"step": 11, "train_loss": 1 / 12, "valid_loss": 2.0, "valid_bits_per_byte": 1.0, "health/entropy": 3.0}
    assert read_jsonl(tmp_path / "work/metrics.jsonl") == [*wanted, {"step": 11, "train_loss": 1 / 12}]


def test_of_a_shorter_horizon_with_more_rows_each_that_is_due_stays(tmp_path: Path) -> None:
    """2,000 steps have a row each, 4,000 every second one: of the first the second can be made, not the other way."""
    longer = replace(WSD, max_steps=4000)
    assert (row_every(WSD.max_steps), row_every(longer.max_steps)) == (1, 2)
    run = write_run(tmp_path / "run", WSD, last=12)
    assert adopted(tmp_path / "work", [run], replace(longer, hard_stop=11)) == 10
    for name in ("metrics", "timing"):
        assert [row["step"] for row in read_jsonl(tmp_path / f"work/{name}.jsonl")] == [0, 2, 4, 6, 8, 10]
    assert adopted(tmp_path / "shorter", [write_run(tmp_path / "longer", longer, last=12)], WSD) is None
    state = read_json(tmp_path / "work/checkpoints/step-00000010/state.json")
    assert state["identity"] == identity_of(WSD)
