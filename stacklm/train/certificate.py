"""What the audit's certificate covers, and whether training may rely on it."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from stacklm.code import digest, units
from stacklm.config.model import Architecture, own_code
from stacklm.config.schema import plain
from stacklm.config.train import Train
from stacklm.files import read_json
from stacklm.model.build import ModelConfig
from stacklm.train import NotCertifiedError

AUDITED = ("stacklm.model.build", "stacklm.data.batches", "stacklm.train.device", "stacklm.train.validate")
"""The modules that the audit examines, each with everything of this package that it imports."""
FORM = ("precision", "activation_checkpointing", "compile")
"""The settings that determine which code a forward or backward pass runs."""


def form_of(config: Train) -> dict[str, Any]:
    """The settings in `FORM`, as plain values."""
    return {key: getattr(config, key) for key in FORM}


def audited_code(architecture: Architecture) -> str:
    """A digest of all code that the audit examines: a certificate is valid for that code only."""
    return digest(_audited_units() | own_code(architecture))


@cache
def _audited_units() -> dict[str, str]:
    return units(AUDITED)


def check_certificate(path: Path, subject: ModelConfig, config: Train) -> None:
    """Raise `NotCertifiedError` unless the certificate says that this model, trained with these settings and code, is causal."""
    try:
        certificate = read_json(path)
    except FileNotFoundError:
        raise _refused(path, "is not there") from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise _refused(path, "is damaged") from None
    if not isinstance(certificate, dict) or not {"passed", "subject", "form", "code"} <= certificate.keys():
        raise _refused(path, "is incomplete or from an earlier version")
    if certificate["passed"] is not True:
        raise _refused(path, "says that it is not causal")
    if certificate["subject"] != plain(subject):
        raise _refused(path, "is about another model")
    if certificate["form"] != form_of(config):
        raise _refused(path, "is about another form of training (precision, activation_checkpointing or compile)")
    if certificate["code"] != audited_code(subject.architecture):
        raise _refused(path, "is about other code: the model, the batches or the loss changed since")


def _refused(path: Path, why: str) -> NotCertifiedError:
    return NotCertifiedError(f"{path} {why}, so the model is not trained; run the stage `audit` for it again")
