"""The audit of one model: before training as a stage of the pipeline, after it at the start of evaluation, and `stacklm audit`."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from stacklm.audit import AuditError, Fault, causality, data
from stacklm.audit.data import Machinery
from stacklm.audit.probe import MODES, ROWS, Probe
from stacklm.config.model import Architecture
from stacklm.config.params import read_value
from stacklm.config.schema import plain
from stacklm.config.train import Train
from stacklm.data.shards import Shards
from stacklm.files import read_json, write_json
from stacklm.model.build import ModelConfig, build
from stacklm.model.custom import Custom, model_named
from stacklm.model.huggingface import pretrained
from stacklm.model.layers import LanguageModel
from stacklm.model.store import CONFIG, load_model
from stacklm.progress import progress
from stacklm.train.certificate import audited_code, form_of
from stacklm.train.device import apply_memory_options, autocast_context, setup_device

Check = Callable[..., str]
Entries = Iterator[tuple[Check, tuple[Any, ...], str]]
"""Checks to be made, each with its arguments and what it is of."""


@dataclass(frozen=True)
class Finding:
    """One claim `of` something. `finding` is what was measured, or the name of the fault."""

    name: str
    of: str
    claim: str
    passed: bool
    finding: str


def examine(check: Check, *arguments: Any, of: str) -> Finding:
    """Carry out a check `of` something: its entry in the certificate, whether it passed or not."""
    claim, _, _ = inspect.cleandoc(check.__doc__ or "").partition("\n\n")
    try:
        passed, found = True, check(*arguments)
    except Fault as fault:
        passed, found = False, str(fault)
    return Finding(check.__name__, of, " ".join(claim.split()), passed, found)


@dataclass(frozen=True)
class Certificate:
    """All checks of one model.

    `subject` is what it was built from and `form` how it is trained, as plain values; `code` is a digest of the audited source.
    """

    subject: dict[str, Any]
    form: dict[str, Any]
    code: str
    checks: tuple[Finding, ...]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    @property
    def faults(self) -> list[str]:
        """Every fault, after the check that found it."""
        return [f"{check.name} of {check.of}: {check.finding}" for check in self.checks if not check.passed]

    def plain(self) -> dict[str, Any]:
        """As it is written to JSON."""
        return {"passed": self.passed, **asdict(self), "checks": [asdict(check) for check in self.checks]}

    def table(self, title: str) -> str:
        """One line per check with what was measured, or the fault and what was claimed."""
        count = len(self.checks)
        lines = [f"{title}: " + (f"all {count} checks passed" if self.passed else f"{len(self.faults)} of {count} checks FAILED")]
        of = ""
        for check in self.checks:
            if check.of != of:
                of = check.of
                lines.append(f"  {of}")
            lines.append(f"    {'ok   ' if check.passed else 'FAULT'}  {check.name:<9}  {check.finding}")
            if not check.passed:
                lines.append(f"{'':<22}claimed: {check.claim}")
        return "\n".join(lines)


def audit(architecture: Architecture, train: Train, shards: Path, certificate: Path) -> None:
    """Stage `audit`: examine a model before it is trained and write its certificate (JSON).

    Raises `AuditError` with every fault by its name, and writes nothing then.
    """
    tokens = Shards.open(shards)
    found = certify(ModelConfig(architecture, tokens.vocab_size, train.context_length), train, shards=tokens)
    _accept(found, f"audit {architecture.kind}", "so not trained")
    write_json(certificate, found.plain())


def audit_trained(folder: Path, train: Train, certificate: Path) -> None:
    """Examine the weights that training has made, in float32 and in the form that was trained, and write their certificate.

    Raises `AuditError` with every fault by its name, and writes nothing then.
    """
    model, config = load_model(folder)
    device = setup_device(train.device, train.threads)
    shape = config.architecture, config.vocab_size, config.context_length
    checks = causal(model.to(device), config, train, "trained weights", lambda: build(*shape).to(device))
    found = _examined(config, train, checks)
    _accept(found, f"audit of the trained {config.architecture.kind}", "so not evaluated")
    write_json(certificate, found.plain())


def audit_folder(folder: Path, train: Train | None = None) -> Certificate:
    """The certificate of the trained model in a folder; in float32 alone where no settings of training are given.

    Raises what `load_model` raises.
    """
    model, config = load_model(folder)
    return certify(config, train or in_float32(config.context_length), model)


def audit_target(target: str, vocab_size: int, context: int, settings: Iterable[str]) -> tuple[Certificate, str]:
    """The certificate of what is named on the command line, in float32, and a name for its file.

    A folder; a file, `my_model.py` or `my_model.py:MyModel`, with `NAME=VALUE` settings of its class; or `hf:PATH`. Raises what
    reading each of them raises.
    """
    if target.startswith("hf:"):
        path = target.removeprefix("hf:")
        return audit_pretrained(path, context), Path(path).name
    if Path(target).is_dir() or not re.search(r"\.py(:\w+)?$", target):
        return audit_folder(Path(target)), Path(target).resolve().name
    architecture = model_named(target, dict(read_value(one) for one in settings))
    return certify(ModelConfig(architecture, vocab_size, context), in_float32(context)), Path(architecture.path).stem


def audit_pretrained(path: str, context: int) -> Certificate:
    """The certificate of a model of `transformers` with its weights, for sequences of that length."""
    model, architecture, build = pretrained(path, context)
    return certify(ModelConfig(architecture, model.vocab_size, model.context), in_float32(model.context), model, build=build)


def audit_model(config: ModelConfig, train: Train, trained: Path) -> Certificate:
    """The certificate of a model with the weights in `trained`, if there are any and they are of this very model."""
    if (trained / CONFIG).exists() and plain(config).items() <= read_json(trained / CONFIG).items():
        return audit_folder(trained, train)
    return certify(config, train)


def in_float32(context: int) -> Train:
    """Settings of training for a model of which none are known: float32, and nothing compiled or computed in parts."""
    return Train(max_steps=2, warmup_steps=1, context_length=context, global_batch_size=ROWS, micro_batch_size=ROWS, threads=1)


def show(found: Certificate, title: str, file: Path) -> bool:
    """Print a certificate, write it to a file (JSON), and say whether it was passed."""
    print(f"{found.table(title)}\n  written to {file}")
    write_json(file, found.plain())
    return found.passed


def certify(
    config: ModelConfig,
    train: Train,
    trained: LanguageModel | None = None,
    shards: Shards | None = None,
    build: Callable[[Architecture, int, int], LanguageModel] = build,
    machinery: Machinery | None = None,
) -> Certificate:
    """All checks: of trained weights (after a few steps where there are none), of data and loss, of learning.

    Equal models get equal certificates: what is drawn has seeds of its own.
    """
    device = setup_device(train.device, train.threads)
    machinery = machinery or Machinery()

    def fresh(vocab_size: int, context: int) -> LanguageModel:
        torch.manual_seed(0)
        return build(config.architecture, vocab_size, context).to(device)

    def entries() -> Entries:
        if trained is None:
            model, weights = fresh(config.vocab_size, config.context_length), "briefly trained weights"
            if isinstance(model, Custom):
                yield data.steps, (model, config.vocab_size, config.context_length, machinery), weights
            else:
                data.train_briefly(model, config.vocab_size, config.context_length, machinery)
        else:
            model, weights = trained.to(device), "trained weights"
        shape = config.architecture, config.vocab_size, config.context_length
        yield from causal(model, config, train, weights, lambda: build(*shape).to(device))
        yield from ((check, (machinery, train), "batches and loss") for check in data.CHECKS)
        yield from ((check, (shards,), "token shards") for check in data.SHARDS if shards)
        yield data.floor, (fresh, machinery), "learning"

    return _examined(config, train, entries())


def causal(model: LanguageModel, config: ModelConfig, train: Train, weights: str, again: Callable[[], LanguageModel]) -> Entries:
    """The checks of a model that is taken over: in float32, and then in the form that is trained where that is another.

    `again()` makes another one of its shape.
    """
    shape = config.vocab_size, config.context_length
    if isinstance(model, Custom):
        yield causality.rebuilt, (model, again), weights
        if model.in_two_steps:
            yield causality.forward, (model,), weights
    probe = Probe(model, *shape)
    yield from ((check, (probe,), weights) for check in causality.CHECKS)
    if train.threads > 1:
        yield causality.threads, (probe, train.threads), weights
    if form_of(train) != form_of(in_float32(config.context_length)):
        apply_memory_options(model, train)
        modes, rows = (tuple(MODES), train.micro_batch_size) if train.compile else (("training",), 0)
        probe = Probe(model, *shape, autocast_context(train, probe.device), modes, rows)
        with causality.on_threads(train.threads):
            yield from ((check, (probe,), f"{weights} in the form that is trained") for check in causality.AS_TRAINED)


def _examined(config: ModelConfig, train: Train, entries: Entries) -> Certificate:
    """Carry out the checks on one thread, where they do not ask for more: their batches are too small for several to save time."""
    bar = progress(entries, desc=f"audit {config.architecture.kind}", unit="check")
    with causality.on_threads(1):
        found = tuple(examine(check, *arguments, of=of) for check, arguments, of in bar)
    return Certificate(plain(config), form_of(train), audited_code(config.architecture), found)


def _accept(found: Certificate, title: str, consequence: str) -> None:
    print(found.table(title))
    if not found.passed:
        raise AuditError(f"not certified as causal, {consequence}; " + "; ".join(found.faults))
