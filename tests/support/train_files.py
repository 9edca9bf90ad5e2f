"""Tiny training runs for tests: token shards of a cycle that can be learnt, settings, and runs in separate processes."""

from __future__ import annotations

import hashlib
import importlib
import multiprocessing
import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np

from stacklm.config.model import Dense, Model, Stack, Stacked
from stacklm.config.optimizer import AdamW
from stacklm.config.schema import plain
from stacklm.config.train import Train
from stacklm.files import read_jsonl, write_json
from stacklm.model.build import ModelConfig
from stacklm.train.certificate import audited_code, form_of
from stacklm.train.distributed import launch, start_method

VOCAB = 16
CYCLE = np.array([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 0], dtype="<u2")
"""The text of the tiny shards, repeated: the token after 5, 1, 3 or 9 can only be predicted from those before."""

TRAIN = Train(
    max_steps=24,
    context_length=16,
    global_batch_size=4,
    micro_batch_size=4,
    warmup_steps=6,
    eval_every=6,
    eval_tokens=100,
    checkpoint_every=5,
    device="cpu",
    threads=1,
)
OPTIMIZER = AdamW(peak_lr=1e-2)
MODELS = {
    "stacked": Model(Stacked(16, 2, (Stack(4, 4, 16), Stack(4, 8, 32)), dropout=0.1), OPTIMIZER),
    "dense": Model(Dense(16, 2, 1, 32), OPTIMIZER),
}


def write_cycle(folder: Path, tokens: int = 4000) -> Path:
    """Write shards of `tokens` train tokens; a token's text is as long as its id, so the end token 0 has none."""
    return write_ids(folder, {name: np.resize(CYCLE, n) for name, n in {"train": tokens, "valid": 150, "test": 90}.items()})


def write_text(folder: Path, **instead: np.ndarray) -> Path:
    """Write shards of documents of random tokens, none of them in two splits, or of the ids in `instead`."""
    splits = {}
    for seed, (name, documents) in enumerate({"train": 40, "valid": 15, "test": 10}.items()):
        ids_DL = np.random.default_rng(seed).integers(1, VOCAB, (documents, 10), dtype="<u2")
        ids_DL[:, -1] = 0
        splits[name] = ids_DL.ravel()
    return write_ids(folder, splits | instead)


def write_ids(folder: Path, ids_of: Mapping[str, np.ndarray]) -> Path:
    """Write shards with one file per split and a valid manifest."""
    splits = {}
    folder.mkdir(parents=True, exist_ok=True)
    for name, ids in ids_of.items():
        (folder / f"{name}-00000.bin").write_bytes(ids.tobytes())
        shard = {"file": f"{name}-00000.bin", "tokens": len(ids), "sha256": hashlib.sha256(ids.tobytes()).hexdigest()}
        words = int((ids == 0).sum())
        splits[name] = {"tokens": len(ids), "documents": words, "bytes": int(ids.sum()), "words": words, "shards": [shard]}
    kind = {"version": 1, "dtype": "uint16", "vocab_size": VOCAB, "end_id": 0}
    write_json(folder / "manifest.json", {**kind, "tokenizer": "5f" * 32, "token_bytes": list(range(VOCAB)), "splits": splits})
    return folder


def write_certificate(path: Path, model: Model, context: int, passed: bool = True, config: Train = TRAIN) -> Path:
    """Write a short certificate, as the audit would for this model."""
    subject, code = plain(ModelConfig(model.architecture, VOCAB, context)), audited_code(model.architecture)
    write_json(path, {"passed": passed, "subject": subject, "form": form_of(config), "code": code, "checks": []})
    return path


class Lab:
    """Shards, and the runs made from them: each name has a `work` folder and its outputs."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.shards = write_cycle(root / "shards")

    def work(self, name: str) -> Path:
        return self.root / name / "work"

    def run(
        self,
        name: str,
        model: str | Model = "stacked",
        die: tuple | None = None,
        earlier: Sequence[str] = (),
        **changes: Any,
    ) -> int:
        """Train in a separate process, which may resume from `earlier` runs, and return its exit code.

        `die` = (signal, "module:attribute", n) sends the signal when the attribute is called for the n-th time. With several
        processes only the last one does so, before any restart.
        """
        if changes.get("nproc", 1) > 1:
            return self._run_team(name, self._arguments(name, model, die, earlier, changes))
        process = self.start(name, model, die, earlier, **changes)
        process.join()
        return process.exitcode

    def start(
        self, name: str, model: str | Model = "stacked", die: tuple | None = None, earlier: Sequence[str] = (), **changes: Any
    ) -> BaseProcess:
        """Like `run`, without waiting."""
        process = forkserver().Process(target=_train, args=self._arguments(name, model, die, earlier, changes))
        process.start()
        return process

    def _arguments(self, name: str, model: str | Model, die: tuple | None, earlier: Sequence[str], changes: dict) -> tuple:
        (self.root / name).mkdir(exist_ok=True)
        works = [self.work(other) for other in earlier]
        return self.root / name, self.shards, MODELS.get(model, model), replace(TRAIN, **changes), die, works

    def _run_team(self, name: str, arguments: tuple) -> int:
        """Start a team as `pretrain` does, but from this process, which has imported everything already."""
        forkserver()
        try:
            launch(arguments[3].nproc, _train, *arguments)
        except Exception as error:
            with (self.root / name / "log.txt").open("a") as log:
                log.write(f"{type(error).__name__}: {error}")
            return 1
        return 0

    def log(self, name: str) -> str:
        """The output of all runs of that name."""
        return (self.root / name / "log.txt").read_text()

    def rows(self, name: str, file: str = "trained/metrics.jsonl") -> list[dict]:
        return read_jsonl(self.root / name / file)

    def result(self, name: str) -> dict[str, bytes]:
        """The bytes of a run's outputs that must be reproducible."""
        trained = self.root / name / "trained"
        return {path.name: path.read_bytes() for path in sorted(trained.iterdir())}


def forkserver() -> Any:
    """A context whose processes start at once, from a fork server that has imported torch, if the system has one."""
    return multiprocessing.get_context(start_method("torch.distributed.launcher.api", "torch.distributed.fsdp"))


def quiet(log: Path) -> None:
    """Redirect the output of this process to a file, in append mode."""
    with log.open("a") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)


def _train(folder: Path, shards: Path, model: Model, config: Train, die: tuple | None, earlier: list[Path]) -> None:
    from stacklm.train.pretrain import pretrain

    quiet(folder / "log.txt")
    place = os.environ.get("RANK", "0"), os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if die and place == (str(config.nproc - 1), "0"):
        _die_at(*die)
    certificate = write_certificate(folder / "certificate.json", model, config.context_length, config=config)
    outputs = {"trained": folder / "trained", "timing": folder / "timing.jsonl", "work": folder / "work"}
    pretrain(config, model, shards, certificate, **outputs, earlier=earlier)


def _die_at(number: signal.Signals, where: str, n: int) -> None:
    """Replace a function by one that sends this process a signal at its n-th call, before the original is called."""
    module, _, path = where.partition(":")
    *owners, name = path.split(".")
    owner = importlib.import_module(module)
    for part in owners:
        owner = getattr(owner, part)
    original = getattr(owner, name)
    calls = 0

    def dying(*arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == n:
            os.kill(os.getpid(), number)
        return original(*arguments, **keywords)

    setattr(owner, name, dying)
