"""Stage `pretrain`: one model, from initialisation to trained weights."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from stacklm.config.model import Model
from stacklm.config.schema import ParamsError, plain
from stacklm.config.train import Train, check_team
from stacklm.data.batches import TrainBatches, evaluation_batches
from stacklm.data.shards import Shards
from stacklm.files import read_json, read_jsonl, sha256
from stacklm.model.build import ModelConfig
from stacklm.model.store import save_model
from stacklm.train.assemble import assemble
from stacklm.train.errors import NotCertifiedError
from stacklm.train.extend import adopt
from stacklm.train.machine import prepare
from stacklm.train.prefetch import Prefetch
from stacklm.train.team import Team, joined, launched
from stacklm.train.trainer import METRICS, TIMING, Run, train
from stacklm.train.validate import validate


def pretrain(
    config: Train,
    model: Model,
    shards: Path,
    certificate: Path,
    trained: Path,
    timing: Path,
    work: Path,
    earlier: Sequence[Path] = (),
) -> None:
    """Train one model on the train split; write the folder `trained` and the file `timing`.

    Alone, or with `config.processes` others that it starts, or as one of those that `torchrun` started. A killed run goes on
    from the last checkpoint in `work`, and a longer one from where one in the folders `earlier` has come on the same way; on a
    CPU either ends in the same bytes as one that was not killed and began anew. Raises `ParamsError` if the settings do not
    fit the data, `NotCertifiedError` unless the certificate says that this very model can not see the tokens it is to
    predict, and what `train` raises.
    """
    check_team(config, model.optimizer, config.processes)
    if config.processes > 1 and not launched():
        from stacklm.train.launch import launch

        launch(config.processes, pretrain, config, model, shards, certificate, trained, timing, work, earlier)
        return
    device = prepare(config.device, config.threads)
    data = Shards.open(shards)
    _check_windows(config, data.splits["train"]["tokens"])
    _check_certificate(certificate, ModelConfig(model.architecture, data.vocab_size, config.context))
    with joined(device) as team:
        check_team(config, model.optimizer, team.size)
        settings = plain(config) | {"processes": team.size}
        identity = {"train": settings, "model": plain(model), "data": sha256(shards / "manifest.json")}
        run = _run_of(config, model, data, identity, work, device, team)
        team.together(lambda: adopt(work, earlier, identity, config) if team.leads else None)
        train(run)
        run.objective.gather()
        team.together(lambda: _write(run, model, data, trained, timing) if team.leads else None)


def _run_of(
    config: Train, model: Model, data: Shards, identity: dict[str, Any], work: Path, device: torch.device, team: Team
) -> Run:
    batches = TrainBatches(data.split("train"), config.context, config.batch_size, config.seed, team.rank, team.size)
    valid_stream = data.split("valid")
    return assemble(
        f"pretrain {model.architecture.kind}",
        config,
        model,
        data.vocab_size,
        batches=Prefetch(batches, device),
        validate=lambda network: validate(
            network, valid_stream, data.token_bytes, config.context, config.micro_batch, config.valid_tokens, team
        ),
        probe_BT=next(evaluation_batches(valid_stream, config.context, config.micro_batch))[0],
        identity=identity,
        work=work,
        device=device,
        team=team,
    )


def _write(run: Run, model: Model, data: Shards, trained: Path, timing: Path) -> None:
    save_model(trained, run.model, model.architecture, data.vocab_size, run.config.context)
    shutil.copyfile(run.work / METRICS, trained / METRICS)
    shutil.copyfile(run.work / TIMING, timing)
    final = read_jsonl(trained / METRICS)[-1]
    print(
        f"{run.name}: {run.config.last_step:,} steps, {final['tokens']:,} tokens, validation loss "
        f"{final['valid_loss']:.4f} nats/token, {final['valid_bits_per_byte']:.4f} bits per byte"
    )


def _check_windows(config: Train, tokens: int) -> None:
    windows = tokens // config.context
    if windows < config.batch_size:
        raise ParamsError(
            f"train.context: the train split has {tokens:,} tokens, {windows} windows of {config.context}, but a batch takes "
            f"train.batch_size = {config.batch_size} of them; shorten the context, shrink the batch or give more text"
        )


def _check_certificate(path: Path, subject: ModelConfig) -> None:
    certificate = read_json(path)
    if not certificate["passed"] or certificate["subject"] != plain(subject):
        about = "says that it is not causal" if not certificate["passed"] else "is about another model"
        raise NotCertifiedError(f"{path} {about}, so it is not trained; run the stage `audit` for it again")
