"""The audit of one model: its stage in the pipeline, before training, and what `stacklm audit` does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from stacklm.audit import causality, data, floor
from stacklm.audit.certificate import AuditError, Certificate, examine
from stacklm.audit.data import Machinery
from stacklm.audit.probe import LONGEST, Probe
from stacklm.config.model import Architecture
from stacklm.config.schema import plain
from stacklm.data.shards import Shards
from stacklm.files import read_json, write_json
from stacklm.model.build import ModelConfig, build
from stacklm.model.store import CONFIG, load_model
from stacklm.train.machine import prepare

THREADS = 1


def audit(architecture: Architecture, context: int, shards: Path, certificate: Path) -> None:
    """Stage `audit`: examine a model before it is trained and write its certificate (JSON).

    Raises `AuditError` with every fault by its name, and writes nothing then.
    """
    found = certify(ModelConfig(architecture, Shards.open(shards).vocab_size, context))
    print(found.table(f"audit {architecture.kind}"))
    if not found.passed:
        raise AuditError("not certified as causal, so not trained; " + "; ".join(found.faults))
    write_json(certificate, found.plain())


def audit_folder(folder: Path) -> Certificate:
    """The certificate of the trained model in a folder. Raises what `load_model` raises."""
    model, config = load_model(folder)
    return certify(config, model)


def audit_model(config: ModelConfig, trained: Path) -> Certificate:
    """The certificate of a model with the weights in `trained`, if there are any and they are of this very model."""
    if (trained / CONFIG).exists() and read_json(trained / CONFIG) == plain(config):
        return audit_folder(trained)
    return certify(config)


def show(found: Certificate, title: str, file: Path) -> bool:
    """Print a certificate, write it to a file (JSON), and say whether it was passed."""
    print(f"{found.table(title)}\n  written to {file}")
    write_json(file, found.plain())
    return found.passed


def certify(
    config: ModelConfig,
    trained: nn.Module | None = None,
    build: Callable[[Architecture, int, int], nn.Module] = build,
    machinery: Machinery | None = None,
) -> Certificate:
    """All checks: of fresh weights, of trained ones (after a few steps where there are none), of data and loss, of learning.

    Equal models get equal certificates: what is drawn has seeds of its own.
    """
    device = prepare("auto", THREADS)
    machinery = machinery or Machinery()

    def fresh(vocab_size: int, context: int) -> nn.Module:
        torch.manual_seed(0)
        return build(config.architecture, vocab_size, context).to(device)

    shape = config.vocab_size, config.context
    probes = {"fresh weights": Probe(fresh(*shape), *shape)}
    if trained is None:
        trained = fresh(*shape)
        floor.train_briefly(trained, config.vocab_size, min(config.context, LONGEST), machinery)
        probes["briefly trained weights"] = Probe(trained, *shape)
    else:
        probes["trained weights"] = Probe(trained.to(device), *shape)
    checks = [(check, (probe,), of) for of, probe in probes.items() for check in causality.CHECKS]
    checks += [(check, (machinery,), "batches and loss") for check in data.CHECKS]
    checks += [(floor.floor, (fresh, machinery), "learning")]
    bar = tqdm(checks, desc=f"audit {config.architecture.kind}", unit="check", mininterval=0.5)
    return Certificate(plain(config), tuple(examine(check, *arguments, of=of) for check, arguments, of in bar))
