"""One trial: audit and train a model, score it per document, and write a small record."""

from __future__ import annotations

import importlib.metadata
import math
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from stacklm.audit.audit import audit
from stacklm.code import digest
from stacklm.config.model import Architecture, Model, own_code
from stacklm.config.schema import plain
from stacklm.config.train import Train, passes
from stacklm.data.batches import evaluation_batches
from stacklm.data.shards import Shards
from stacklm.files import read_json, sha256, write_json
from stacklm.lab.answers import LEARNT, learning, score_answers
from stacklm.model.build import ModelConfig
from stacklm.model.count import count
from stacklm.model.layers import LanguageModel
from stacklm.model.store import WEIGHTS, load_model
from stacklm.train import NotCertifiedError
from stacklm.train.certificate import check_certificate
from stacklm.train.pretrain import pretrain
from stacklm.train.validate import scored_tokens

RECORD = "record.json"
DOCUMENTS = "documents.npz"
JUDGED = ("valid", "test")
MOST_GROUPS = 200
"""Maximum number of scores in a record, to keep it small: beyond that, those of neighbouring documents are summed."""


@dataclass(frozen=True)
class Trial:
    """One training run: an arm's model with its learning rate, and the training settings with the seed."""

    model: Model
    train: Train
    data: str
    """Digest of the tokens used for training and evaluation."""
    code: str
    """Identity of the training and evaluation code."""
    own: str = ""
    """Identity of the code of a model from outside this package (`stacklm.config.model.own_code`)."""

    @cached_property
    def identity(self) -> str:
        """Equal for trials that give the same weights, in any experiment."""
        return digest(self.facts)[:16]

    @property
    def facts(self) -> dict[str, Any]:
        """The trial as plain values, for the identity and the record."""
        facts = plain(self)
        return facts if self.own else {name: fact for name, fact in facts.items() if name != "own"}

    @property
    def shape(self) -> str:
        """Equal for trials that can share a certificate: they differ only in learning rate, seed or schedule."""
        return digest([plain(self.model.architecture), plain(passes(self.train)), self.data, self.code + self.own])[:16]


@dataclass(frozen=True)
class DocumentScores:
    """Nats and bytes of each document's text, [D] each, in the order of the split."""

    nats_D: NDArray[np.float64]
    bytes_D: NDArray[np.int64]

    @property
    def bits_per_byte(self) -> float:
        return float(self.nats_D.sum() / (math.log(2) * self.bytes_D.sum()))

    def grouped(self, most: int = MOST_GROUPS) -> DocumentScores:
        """Scores summed over at most `most` groups of neighbouring documents, with nearly equal numbers of documents."""
        D = len(self.nats_D)
        starts = np.linspace(0, D, min(D, most), endpoint=False).astype(int)
        return DocumentScores(np.add.reduceat(self.nats_D, starts), np.add.reduceat(self.bytes_D, starts))


def run_trial(trial: Trial, shards: Path, work: Path, batch_size: int = 16) -> dict[str, Any]:
    """Train and score one model; return its record, which is also written to the trial's folder below `work`.

    Existing results are reused: a finished trial is read, a killed one resumes from its last checkpoint, and a certificate is valid
    for all trials of the same `shape`. Raises `AuditError` for a model that is not causal, `NonFiniteError` if training diverges,
    and `ValueError` if shards or code are not those of the trial.
    """
    data = Shards.open(shards)
    if trial.data != sha256(shards / "manifest.json"):
        raise ValueError(f"{shards} does not hold the tokens of trial {trial.identity}")
    if trial.own != own_digest(trial.model.architecture):
        raise ValueError(
            f"the code of the model of trial {trial.identity} has changed since it was planned: undo it, or plan again"
        )
    folder = work / "trials" / trial.identity
    if (folder / RECORD).exists():
        return read_json(folder / RECORD)
    folder.mkdir(parents=True, exist_ok=True)
    certificate = certified(trial, data, work)
    trained, started, began = folder / "model", time.monotonic(), datetime.now(UTC)
    pretrain(trial.train, trial.model, shards, certificate, trained, folder / "timing.jsonl", folder / "run")
    seconds = time.monotonic() - started
    model, config = load_model(trained)
    tokens = trial.train.last_step * trial.train.tokens_per_step
    scored = _answers if data.targets else _documents
    record = {
        "identity": trial.identity,
        **trial.facts,
        **scored(model, data, folder, config.context_length, batch_size),
        "weights": sha256(trained / WEIGHTS),
        "flops": tokens * count(trial.model.architecture, data.vocab_size, config.context_length).training_flops_per_token,
        "seconds": round(seconds, 1),
        "began": began.isoformat(timespec="seconds"),
        "machine": machine(),
    }
    write_json(folder / RECORD, record)  # last: its presence marks the trial as complete
    return record


def own_digest(architecture: Architecture) -> str:
    """Identity of the current code of a model from outside this package; empty for one of this package."""
    code = own_code(architecture)
    return digest(code) if code else ""


def machine() -> dict[str, str]:
    """What bitwise equal results depend on besides the trial itself: processor, its kernels in use, and versions."""
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {
        "system": platform.system(),
        "processor": platform.machine(),
        "model": _model_of_processor(),
        "kernels": torch.backends.cpu.get_cpu_capability(),
        **gpu,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("torch", "numpy")},
    }


def _model_of_processor() -> str:
    """The processor's name: libraries choose the order of additions by cache sizes too, not only by the instruction set."""
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text(encoding="utf-8").splitlines() if facts.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())


def _documents(model: LanguageModel, data: Shards, folder: Path, context: int, batch_size: int) -> dict[str, Any]:
    found = {split: score_documents(model, data, split, context, batch_size) for split in JUDGED}
    arrays = {f"{split}_{name}": value for split, scores in found.items() for name, value in vars(scores).items()}
    np.savez_compressed(folder / DOCUMENTS, **arrays)
    scores = {split: {"bits_per_byte": scores.bits_per_byte, "documents": len(scores.nats_D)} for split, scores in found.items()}
    return {**scores, "groups": _written(found["test"].grouped())}


def _answers(model: LanguageModel, data: Shards, folder: Path, context: int, batch_size: int) -> dict[str, Any]:
    """Scores of a synthetic task, with the step of the first checkpoint that has learnt it, by accuracy on the valid set."""
    found = {split: score_answers(model, data, split, context, batch_size) for split in JUDGED}
    steps = learning(model, folder / "run", data, "valid", context, batch_size)
    return {**found, "learnt_at": next((step for step, accuracy in steps if accuracy >= LEARNT), None)}


def certified(trial: Trial, data: Shards, work: Path) -> Path:
    """The certificate for the trial's shape; runs the audit if there is none valid for the current code."""
    subject = ModelConfig(trial.model.architecture, data.vocab_size, trial.train.context_length)
    path = work / "certificates" / f"{trial.shape}.json"
    try:
        check_certificate(path, subject, trial.train)
    except NotCertifiedError:
        audit(trial.model.architecture, trial.train, data.folder, path)
    return path


def score_documents(model: LanguageModel, data: Shards, split: str, context: int, batch_size: int) -> DocumentScores:
    """Scores of each document of a split, from one pass over the whole stream: a token belongs to the document whose end token
    comes next. Special tokens represent no text and do not count."""
    stream = data.split(split)
    nats_D, bytes_D = np.zeros(stream.documents), np.zeros(stream.documents, np.int64)
    ended = 0
    model.eval()
    for scored in scored_tokens(model, evaluation_batches(stream, context, batch_size), data.token_bytes):
        nats, targets, sizes = (values.numpy() for values in scored)
        ends = targets == stream.end_id
        document = ended + np.cumsum(ends) - ends
        text = sizes > 0
        nats_D += np.bincount(document[text], nats[text], minlength=stream.documents)
        bytes_D += np.bincount(document[text], sizes[text], minlength=stream.documents).astype(np.int64)
        ended += int(ends.sum())
    return DocumentScores(nats_D, bytes_D)


def read_documents(folder: Path) -> Mapping[str, DocumentScores]:
    """The scores of a finished trial's documents, by split."""
    with np.load(folder / DOCUMENTS, allow_pickle=False) as arrays:
        return {split: DocumentScores(arrays[f"{split}_nats_D"], arrays[f"{split}_bytes_D"]) for split in JUDGED}


def read_groups(record: Mapping[str, Any]) -> DocumentScores:
    """The test-set scores by group of documents, as stored in a record."""
    return DocumentScores(*(np.array(record["groups"][name].split(), kind) for name, kind in _GROUPS.items()))


_GROUPS = {"nats": np.float64, "bytes": np.int64}


def _written(scores: DocumentScores) -> dict[str, str]:
    """Each array as one line of text; a hundredth of a nat is far below the differences between seeds."""
    return {"nats": " ".join(f"{nats:.2f}" for nats in scores.nats_D), "bytes": " ".join(map(str, scores.bytes_D))}
