"""Stage `pretrain`: one model, from initialisation to trained weights."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from stacklm.config.model import Model
from stacklm.config.schema import ParamsError, plain
from stacklm.config.train import Train, check_team
from stacklm.data.batches import evaluation_batches
from stacklm.data.shards import Shards
from stacklm.files import read_json, read_jsonl, sha256, write_jsonl
from stacklm.model.build import ModelConfig
from stacklm.model.store import CONFIG, save_model
from stacklm.train.certificate import check_certificate
from stacklm.train.device import setup_device
from stacklm.train.distributed import init_process_group, is_launched, launch
from stacklm.train.metrics import METRICS, TIMING
from stacklm.train.resume import warm_start
from stacklm.train.trainer import Prefetch, Run, train
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

    Runs in this process, in `config.nproc` processes that it starts, or as one of those started by `torchrun`. A killed run
    resumes from the last checkpoint in `work`, and a longer one from a checkpoint of an identical run in the folders `earlier`; on
    a CPU both produce the same bytes as an uninterrupted run. Raises `ParamsError` if the settings do not fit the data,
    `NotCertifiedError` unless the certificate says that this model, with the current code, cannot see the tokens that it predicts,
    and what `train` raises.
    """
    check_team(config, model.optimizer, config.nproc)
    if config.nproc > 1 and not is_launched():
        launch(config.nproc, pretrain, config, model, shards, certificate, trained, timing, work, earlier)
        return
    device = setup_device(config.device, config.threads)
    data = Shards.open(shards)
    context, batch_size, micro_batch_size = config.context_length, config.global_batch_size, config.micro_batch_size
    _check_sequences(config, data.splits["train"]["tokens"])
    check_certificate(certificate, ModelConfig(model.architecture, data.vocab_size, context), config)
    train_stream, valid_stream = data.split("train"), data.split("valid")
    with init_process_group(device) as team:
        check_team(config, model.optimizer, team.size)
        settings = plain(config) | {"nproc": team.size}
        identity = {"train": settings, "model": plain(model), "data": sha256(shards / "manifest.json")}
        run = Run(
            f"pretrain {model.architecture.kind}",
            config,
            model,
            data.vocab_size,
            batches=Prefetch(train_stream, context, batch_size, config.seed, team.rank, team.size, device=device),
            validate=lambda network: validate(
                network, valid_stream, data.token_bytes, context, micro_batch_size, config.eval_tokens, team
            ),
            probe_BT=next(evaluation_batches(valid_stream, context, micro_batch_size))[0],
            identity=identity,
            work=work,
            device=device,
            team=team,
        )
        team.gather(lambda: warm_start(work, earlier, identity, config) if team.is_main else None)
        train(run)
        run.objective.gather()
        team.gather(lambda: _write(run, model, data, trained, timing) if team.is_main else None)


def _write(run: Run, model: Model, data: Shards, trained: Path, timing: Path) -> None:
    save_model(trained, run.model, model.architecture, data.vocab_size, run.config.context_length, data.tokenizer)
    shutil.copyfile(run.work / METRICS, trained / METRICS)
    *times, last = read_jsonl(run.work / TIMING)
    digest = read_json(trained / CONFIG)["sha256"]  # links these times to these weights
    write_jsonl(timing, [*times, {**last, "model_sha256": digest}])
    final = read_jsonl(trained / METRICS)[-1]
    print(
        f"{run.name}: {run.config.last_step:,} steps, {final['tokens']:,} tokens, validation loss "
        f"{final['valid_loss']:.4f} nats/token, {final['valid_bits_per_byte']:.4f} bits per byte"
    )


def _check_sequences(config: Train, tokens: int) -> None:
    sequences = tokens // config.context_length
    if sequences < config.global_batch_size:
        raise ParamsError(
            f"train.context_length: the train split has {tokens:,} tokens, {sequences} sequences of {config.context_length}, "
            f"but a batch takes train.global_batch_size = {config.global_batch_size} of them; "
            "shorten the context, shrink the batch or give more text"
        )
