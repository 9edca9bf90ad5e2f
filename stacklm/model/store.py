"""A model on disk: `model.safetensors` with every parameter once, and `config.json` with its settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stacklm.config.model import Architecture, Python, own_code
from stacklm.config.schema import ParamsError, listed, plain, read
from stacklm.files import read_json, sha256, write_json, written_aside
from stacklm.model.build import ModelConfig, build
from stacklm.model.custom import Custom
from stacklm.model.layers import LanguageModel

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
ABOUT = {"tokenizer", "sha256"}
"""Keys of `config.json` besides the settings; for a model from outside this package also `code`, by function and class."""
AGAIN = "train the model again or restore the file"


class StoreError(ValueError):
    """A saved model that cannot be used; the message says what is wrong and what to do."""


def save_model(
    folder: Path, model: nn.Module, architecture: Architecture, vocab_size: int, context: int, tokenizer: str | None = None
) -> None:
    """Write the weights and the settings that `load_model` reads. A parameter that two modules share is written once.

    `config.json` also holds the digest of the tokenizer that made the training data, if known, and the SHA-256 of the weights.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in contents(model).items()}
    with written_aside(folder / WEIGHTS) as aside:
        save_tensors(tensors, aside)
    about: dict[str, Any] = {"tokenizer": tokenizer, "sha256": sha256(folder / WEIGHTS)}
    if code := own_code(architecture):
        about["code"] = code
    write_json(folder / CONFIG, plain(ModelConfig(architecture, vocab_size, context)) | about)


def contents(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter once, by name; for a user's model also its persistent buffers, which may be random."""
    found: dict[str, Tensor] = dict(model.named_parameters())
    if isinstance(model, Custom):
        kept = model.state_dict(keep_vars=True)
        found |= {name: buffer for name, buffer in model.named_buffers() if name in kept}
        found = {name.removeprefix(model.prefix): tensor for name, tensor in found.items()}
    return found


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file with the default permissions of new files; the library makes it readable only by its owner."""
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path)
    path.chmod(mode)


def load_model(folder: Path, tokenizer: str | None = None) -> tuple[LanguageModel, ModelConfig]:
    """Load the model in that folder to the CPU, in training mode, in the dtype it was saved in.

    `tokenizer` is the digest of the tokenizer to be used with it: ids of another one of the same size would be in range but mean
    other text. The caller's random state is unchanged. Raises `StoreError` if a file is missing or damaged, if the weights are not
    those that were saved or do not match the settings, or if the model was trained with another tokenizer or, for a model from a
    file of the project, with other code. Code in the folder is never run.
    """
    config, about = _read_config(folder)
    if tokenizer is not None and about["tokenizer"] != tokenizer:
        trained = f"tokenizer {about['tokenizer']}" if about["tokenizer"] else "a tokenizer that is not known"
        raise StoreError(
            f"{folder / CONFIG}: trained with {trained}, not with {tokenizer}; take model and tokenizer from one run, "
            "or run the stage `pretrain` again"
        )
    weights = folder / WEIGHTS
    if (found := sha256(weights)) != about["sha256"]:
        raise StoreError(f"{weights}: damaged, its SHA-256 is {found}, but {CONFIG} says {about['sha256']}; {AGAIN}")
    try:
        tensors = load_file(weights)
    except SafetensorError as error:
        raise StoreError(f"{weights}: damaged, {error}; {AGAIN}") from None
    _check_code(config.architecture, about["code"], folder)
    with torch.random.fork_rng(devices=[]):
        model = build(config.architecture, config.vocab_size, config.context_length)
    _check_match(model, tensors, folder)
    names = (name.removeprefix(model.prefix) for name, _ in model.named_parameters())
    if spoilt := [name for name in names if not (tensors[name].is_floating_point() and tensors[name].isfinite().all())]:
        raise StoreError(f"{weights}: {listed(spoilt[:5])} has numbers that are not finite or of another type; {AGAIN}")
    for name, tensor in contents(model).items():
        tensor.data = tensors[name]
    return model, config


def _check_code(architecture: Architecture, trained: dict[str, str], folder: Path) -> None:
    """Raise `StoreError` if the code of a user's model has changed since training, or is in the folder of its weights."""
    if isinstance(architecture, Python) and architecture.file().resolve().is_relative_to(folder.resolve()):
        raise StoreError(
            f"{folder / CONFIG}: its code, {architecture.path}, lies in the model's own folder, from which none is run"
        )
    now = own_code(architecture)
    if changed := [name for name in {**trained, **now} if trained.get(name) != now.get(name)]:
        raise StoreError(
            f"{folder / CONFIG}: {listed(changed[:3])}{f' and {len(changed) - 3} more' if len(changed) > 3 else ''} changed since "
            "this model was trained; bring back the code as it was, or train the model again"
        )


def _read_config(folder: Path) -> tuple[ModelConfig, dict[str, Any]]:
    """The settings of a saved model, and the other entries of `config.json`."""
    for file in (CONFIG, WEIGHTS):
        if not (folder / file).is_file():
            raise StoreError(f"{folder / file}: no such file; a model is a folder with {CONFIG} and {WEIGHTS}")
    try:
        content = read_json(folder / CONFIG)
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{folder / CONFIG}: damaged, {error}; {AGAIN}") from None
    if not isinstance(content, dict) or not content.keys() >= ABOUT:
        raise StoreError(f"{folder / CONFIG}: damaged or of an earlier version, without {listed(sorted(ABOUT))}; {AGAIN}")
    about = {"code": content.pop("code", {}), **{key: content.pop(key) for key in ABOUT}}
    try:
        return read(ModelConfig, content, key=CONFIG), about
    except ParamsError as error:
        raise StoreError(f"{folder / CONFIG}: {error}; {AGAIN}") from None


def _check_match(model: nn.Module, tensors: dict[str, Tensor], folder: Path) -> None:
    wanted = {name: tuple(tensor.shape) for name, tensor in contents(model).items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    wrong = [f"{name} is missing" for name in sorted(wanted.keys() - found.keys())]
    wrong += [f"{name} is not part of it" for name in sorted(found.keys() - wanted.keys())]
    wrong += [
        f"{name} has shape {list(found[name])} instead of {list(wanted[name])}"
        for name in sorted(wanted.keys() & found.keys())
        if wanted[name] != found[name]
    ]
    if wrong:
        more = f", and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        listing = "; ".join(wrong[:5]) + more
        raise StoreError(f"{folder / WEIGHTS} does not hold the model of {CONFIG}: {listing}; take both files from one run")
