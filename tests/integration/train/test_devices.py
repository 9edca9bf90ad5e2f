"""Several processes train one model: here two, on a CPU, over gloo."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from stacklm.config.data import Data, StdlibSource
from stacklm.config.evaluate import Evaluate
from stacklm.config.optimizer import Muon
from stacklm.config.params import Params
from stacklm.config.schema import ParamsError, plain
from stacklm.config.tokenizer import TokenizerConfig
from stacklm.config.train import Train, check_team
from stacklm.data.batches import TrainBatches
from stacklm.data.shards import Shards
from stacklm.files import read_json, read_jsonl, write_json
from stacklm.model.build import build
from stacklm.model.store import load_model
from stacklm.train import DiskFullError, NonFiniteError
from stacklm.train.distributed import init_process_group, launch
from stacklm.train.loss import Objective
from stacklm.train.trainer import Run, train
from stacklm.train.validate import Score, validate
from support import ROOT, wait_for
from support.rounding import drift, rounding
from support.train_files import MODELS, TRAIN, VOCAB, Lab, forkserver, quiet

STEP = "stacklm.train.trainer:train_step"
SHORT = {"max_steps": 12, "warmup_steps": 3, "checkpoint_every": 4, "micro_batch_size": 1}
"""Two processes take two of the four rows of a batch each, one at a time: gradients are accumulated, then shared."""
STACKED = replace(MODELS["stacked"], architecture=replace(MODELS["stacked"].architecture, dropout=0.0))
"""Without what is random on every process for itself."""
TEAMS = {way: {"nproc": 2, "strategy": way} for way in ("ddp", "fsdp")}


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """Shards, with one run of one process, and one each of two that share in either way."""
    lab = Lab(tmp_path_factory.mktemp("lab"))
    assert lab.run("one", STACKED, **SHORT) == 0
    for way, team in TEAMS.items():
        assert lab.run(way, STACKED, **SHORT, **team) == 0, lab.log(way)
    return lab


def alone(work: Callable[..., None], *arguments: Any) -> None:
    """Do it in a process of its own."""
    process = forkserver().Process(target=work, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == 0


LOSS = drift(SHORT["max_steps"], TRAIN.tokens_per_step * VOCAB)
"""How far losses may be apart by rounding; gradients and weights respond to a change of the weights a few times as strongly."""


def assert_close(folder: Path, other: Path, figures: float = 8 * LOSS, loss: float = LOSS) -> None:
    """That two runs have the same figures, but for rounding: within relative bounds for all of them, and for the training loss."""
    some, others = read_jsonl(folder / "metrics.jsonl"), read_jsonl(other / "metrics.jsonl")
    assert len(some) == len(others) == SHORT["max_steps"] + 1
    for row, wanted in zip(some, others, strict=True):
        assert row == pytest.approx(wanted, rel=figures)
        assert row.get("train_loss", 0) == pytest.approx(wanted.get("train_loss", 0), rel=loss)


@pytest.mark.parametrize("way", TEAMS)
def test_two_processes_train_as_one_does(lab: Lab, way: str) -> None:
    assert_close(lab.root / way / "trained", lab.root / "one" / "trained")
    trained, config = load_model(lab.root / way / "trained")
    wanted, wanted_config = load_model(lab.root / "one" / "trained")
    assert config == wanted_config
    for name, weight in wanted.state_dict().items():
        assert (trained.state_dict()[name] - weight).norm() <= 8 * LOSS * weight.norm(), name


def test_they_do_with_rounded_products_too(lab: Lab) -> None:
    """Sharded gradients must have arrived when they are shared, those of weights that autocast rounded as well.

    A gradient has been through up to 20 rounded products in series (two stacks, forward and backward), each off by eps / 2; a
    loss is the mean over the 64 tokens of a batch of what is off alike.
    """
    figures = torch.finfo(torch.bfloat16).eps / 2 * math.sqrt(20)
    bounds = {"figures": figures, "loss": figures / math.sqrt(64)}
    for name, team in {"one": {}, **TEAMS}.items():
        assert lab.run(f"rounded-{name}", STACKED, precision="bf16", **SHORT, **team) == 0
    for way in TEAMS:
        assert_close(lab.root / f"rounded-{way}" / "trained", lab.root / "rounded-one" / "trained", **bounds)


def test_they_share_the_work_of_a_validation(lab: Lab, tmp_path: Path) -> None:
    """Seven batches of one sequence, the last one of four tokens: the second process has to fill up."""
    launch(2, judge, tmp_path, lab.shards)
    alone(judge, tmp_path, lab.shards)
    first, second, whole = (read_json(tmp_path / f"{name}.json") for name in ("0 of 2", "1 of 2", "0 of 1"))
    assert [process["passes"] for process in (first, second, whole)] == [4, 4, 7]
    assert first["score"] == second["score"] == pytest.approx(whole["score"], rel=rounding(torch.float64, 100))
    assert whole["score"]["tokens"] == 100


def judge(folder: Path, shards: Path) -> None:
    """Score a fresh model, and note how often it was called."""
    torch.manual_seed(1)
    model, calls = build(STACKED.architecture, VOCAB, 16), []
    model.stacks[0].register_forward_hook(lambda *_: calls.append(None))
    data = Shards.open(shards)
    with init_process_group(torch.device("cpu")) as team:
        found = validate(model, data.split("valid"), data.token_bytes, context=16, batch_size=1, tokens=100, team=team)
        write_json(folder / f"{team.rank} of {team.size}.json", {"score": asdict(found), "passes": len(calls)})


@pytest.mark.slow
@pytest.mark.parametrize("way", TEAMS)
def test_they_do_with_compiled_code_too(lab: Lab, way: str) -> None:
    assert lab.run(f"compiled-{way}", STACKED, compile=True, **SHORT, **TEAMS[way]) == 0
    assert_close(lab.root / f"compiled-{way}" / "trained", lab.root / "one" / "trained")


@pytest.mark.parametrize("way", TEAMS)
def test_only_one_of_them_writes_and_speaks(lab: Lab, way: str) -> None:
    for folder in ("work", "work/checkpoints", "trained"):
        assert set(os.listdir(lab.root / way / folder)) == set(os.listdir(lab.root / "one" / folder))
    assert [row["step"] for row in lab.rows(way, "timing.jsonl")] == list(range(SHORT["max_steps"] + 1))
    assert lab.log(way).count("12 steps, 768 tokens, validation loss") == 1
    assert "arn" not in lab.log(way)


@pytest.mark.parametrize("way", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_one_that_is_killed_comes_back_with_all_others_from_the_last_checkpoint(lab: Lab, way: str) -> None:
    name = f"killed-{way}"
    assert lab.run(name, STACKED, die=(signal.SIGKILL, STEP, 7), **SHORT, **TEAMS[way]) == 0
    assert "resuming after step 4 of 12" in lab.log(name)
    assert lab.result(name) == lab.result(way)


def test_a_signal_to_one_stops_all_at_the_same_step_with_a_checkpoint(lab: Lab) -> None:
    assert lab.run("asked", STACKED, die=(signal.SIGTERM, STEP, 6), **SHORT, **TEAMS["ddp"]) == 1
    assert "stopped after step 6 of 12; the same command resumes there" in lab.log("asked")
    assert lab.run("asked", STACKED, **SHORT, **TEAMS["ddp"]) == 0
    assert "resuming after step 6 of 12" in lab.log("asked")
    assert lab.result("asked") == lab.result("ddp")


@pytest.mark.slow
def test_a_run_goes_on_with_other_processes(lab: Lab, tmp_path: Path) -> None:
    """Each part by others than the one before: one process reads pieces of many, and many a whole."""
    parts = [TEAMS["fsdp"], {}, TEAMS["ddp"], TEAMS["fsdp"], TEAMS["ddp"]]
    for stop, part in enumerate(parts, start=8):
        config = replace(TRAIN, **SHORT, **part, hard_stop=stop)
        if part:
            launch(2, go_on, tmp_path, lab.shards, config)
        else:
            alone(go_on, tmp_path, lab.shards, config)
    assert [f"resuming after step {step} of" in (tmp_path / "log.txt").read_text() for step in range(8, 12)] == 4 * [True]
    losses, wanted = (
        [row["train_loss"] for row in read_jsonl(folder / "metrics.jsonl")[1:]] for folder in (tmp_path, lab.work("one"))
    )
    assert losses == pytest.approx(wanted, rel=LOSS)


def go_on(folder: Path, shards: Path, config: Train) -> None:
    """Train whatever is there."""
    quiet(folder / "log.txt")
    with init_process_group(torch.device("cpu")) as team:
        stream = Shards.open(shards).split("train")
        batches = TrainBatches(stream, config.context_length, config.global_batch_size, config.seed, team.rank, team.size)
        score, probe_BT = Score(tokens=1, nats=2.0, text_nats=2.0, bytes=1), torch.zeros(1, 4, dtype=torch.long)
        cpu = torch.device("cpu")
        train(Run("test", config, STACKED, VOCAB, batches, lambda _: score, probe_BT, {}, folder, cpu, team))


def test_a_number_that_is_not_finite_on_one_stops_all_before_the_update(lab: Lab, tmp_path: Path) -> None:
    config = replace(TRAIN, **SHORT, **TEAMS["ddp"])
    with pytest.raises(NonFiniteError, match=r"step 6: .*still that of step 5"):
        launch(2, spoil, tmp_path, lab.shards, config)
    assert read_jsonl(tmp_path / "metrics.jsonl")[-1]["step"] == 5
    (note,) = read_jsonl(tmp_path / "nonfinite.jsonl")
    assert len(note["sequences"]) == config.global_batch_size


def spoil(folder: Path, shards: Path, config: Train) -> None:
    """Train, but in the sixth step the loss of the last process is no number."""
    forward, calls = Objective.forward, 0

    def failing(objective: Objective, inputs_BT: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return forward(objective, inputs_BT, targets_BT) * (float("nan") if calls == 11 else 1)

    if os.environ["RANK"] == "1":
        Objective.forward = failing
    go_on(folder, shards, config)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no limit on the size of files")
def test_a_disk_that_is_full_for_one_ends_all_and_they_are_not_started_again(lab: Lab, tmp_path: Path) -> None:
    config = replace(TRAIN, **SHORT, **TEAMS["ddp"])
    with pytest.raises(DiskFullError, match=r"no room for the checkpoint of step 4: it takes [\d,]+ bytes"):
        launch(2, fill, tmp_path, lab.shards, config)
    assert os.listdir(tmp_path / "checkpoints") == ["step-00000000"]
    assert "resuming" not in (tmp_path / "log.txt").read_text()


def fill(folder: Path, shards: Path, config: Train) -> None:
    """Train, but the last process may write nothing that is larger than a checkpoint without moments."""
    import resource

    if os.environ["RANK"] == "1":
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))
    go_on(folder, shards, config)


@pytest.mark.slow
def test_the_command_and_torchrun_train_alike_and_leave_no_process_behind(lab: Lab, tmp_path: Path) -> None:
    """The command that starts two processes is killed; then two that `torchrun` started go on where those were."""
    params = {"data": {"source": {"kind": "stdlib"}}, "tokenizer": {"vocab_size": 300}}
    train = {key: value for key, value in plain(replace(TRAIN, **SHORT, **TEAMS["ddp"])).items() if key != "seed"}
    params |= {"train": train, "seeds": [TRAIN.seed], "models": {"stacked": plain(STACKED)}, "evaluate": {}}
    write_json(tmp_path / "params.yaml", params)
    certificate = lab.root / "ddp" / "certificate.json"
    command = ["-m", "stacklm.train", "--model", "stacked", "--shards", lab.shards, "--certificate", certificate]
    started = subprocess.Popen([sys.executable, *command], cwd=tmp_path, env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    wait_for(lambda: (tmp_path / "out/runs/stacked-1/work/checkpoints/step-00000000").exists(), interval=0.005)
    processes = psutil.Process(started.pid).children(recursive=True)
    started.kill()
    started.wait()
    wait_for(lambda: not any(process.is_running() for process in processes))
    assert not (tmp_path / "out/runs/stacked-1/trained").exists()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*torchrun, *command], cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True, check=True)
    assert "resuming after step" in done.stdout
    for file, content in lab.result("ddp").items():
        assert (tmp_path / "out/runs/stacked-1/trained" / file).read_bytes() == content


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def test_settings_that_no_team_can_use_are_refused() -> None:
    with pytest.raises(ParamsError, match=r"nproc: 3 cannot share a batch of global_batch_size = 4 sequences equally"):
        check_team(TRAIN, STACKED.optimizer, 3)
    with pytest.raises(ParamsError, match=r"nproc: 2 need all gradients .*optimizer_in_backward must be false"):
        check_team(TRAIN, replace(STACKED.optimizer, optimizer_in_backward=True), 2)
    with pytest.raises(ParamsError, match=r"strategy: fsdp cuts matrices, which muon needs whole; choose ddp"):
        check_team(replace(TRAIN, strategy="fsdp"), Muon(), 2)
    check_team(replace(TRAIN, strategy="fsdp"), Muon(), 1)
    with pytest.raises(ParamsError, match=r"train.nproc: 3 cannot share .* \(models.stacked\)"):
        Params(Data(StdlibSource()), TokenizerConfig(300), replace(TRAIN, nproc=3), {"stacked": STACKED}, (1,), Evaluate())
