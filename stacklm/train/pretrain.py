"""Stage `pretrain`: one model, from initialisation to trained weights."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from stacklm.config.model import Model
from stacklm.config.schema import ParamsError, plain
from stacklm.config.train import Train
from stacklm.data.batches import TrainBatches, evaluation_batches
from stacklm.data.shards import Shards
from stacklm.files import read_json, read_jsonl, sha256
from stacklm.model.build import ModelConfig
from stacklm.model.store import save_model
from stacklm.train.assemble import assemble
from stacklm.train.extend import adopt
from stacklm.train.machine import prepare
from stacklm.train.prefetch import Prefetch
from stacklm.train.trainer import METRICS, TIMING, train
from stacklm.train.validate import validate


class NotCertifiedError(RuntimeError):
    """A model that no audit has found to be causal."""


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

    A killed run goes on from the last checkpoint in `work`, and a longer one from where one in the folders `earlier` has come
    on the same way; on a CPU either ends in the same bytes as one that was not killed and began anew. Raises `ParamsError`
    if the settings do not fit the data, `NotCertifiedError` unless the certificate says that this very model can not see
    the tokens it is to predict, and what `train` raises.
    """
    name = f"pretrain {model.architecture.kind}"
    device = prepare(config.device, config.threads)
    data = Shards.open(shards)
    _check_windows(config, data.splits["train"]["tokens"])
    _check_certificate(certificate, ModelConfig(model.architecture, data.vocab_size, config.context))
    train_stream, valid_stream = data.split("train"), data.split("valid")
    run = assemble(
        name,
        config,
        model,
        data.vocab_size,
        batches=Prefetch(TrainBatches(train_stream, config.context, config.batch_size, config.seed), device),
        validate=lambda network: validate(
            network, valid_stream, data.token_bytes, config.context, config.micro_batch, config.valid_tokens
        ),
        probe_BT=next(evaluation_batches(valid_stream, config.context, config.micro_batch))[0],
        identity={"train": plain(config), "model": plain(model), "data": sha256(shards / "manifest.json")},
        work=work,
        device=device,
    )
    adopt(work, earlier, run.identity, config)
    train(run)
    save_model(trained, run.model, model.architecture, data.vocab_size, config.context)
    shutil.copyfile(work / METRICS, trained / METRICS)
    shutil.copyfile(work / TIMING, timing)
    final = read_jsonl(trained / METRICS)[-1]
    print(
        f"{name}: {config.last_step:,} steps, {final['tokens']:,} tokens, validation loss "
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
