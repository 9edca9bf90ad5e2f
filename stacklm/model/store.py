"""A model on disk: `model.safetensors` with every parameter once, and `config.json` with what built it."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stacklm.config.model import Architecture
from stacklm.config.schema import plain, read
from stacklm.files import read_json, write_json, written_aside
from stacklm.model.build import ModelConfig, build

WEIGHTS = "model.safetensors"
CONFIG = "config.json"


class StoreError(ValueError):
    """Weights that cannot be used; the message says what is wrong and what to do."""


def save_model(folder: Path, model: nn.Module, architecture: Architecture, vocab_size: int, context: int) -> None:
    """Write the weights and the settings that `load_model` reads. A parameter that two modules share is written once."""
    tensors = {name: parameter.detach().cpu().contiguous() for name, parameter in model.named_parameters()}
    with written_aside(folder / WEIGHTS) as aside:
        save_file(tensors, aside)
    write_json(folder / CONFIG, plain(ModelConfig(architecture, vocab_size, context)))


def load_model(folder: Path) -> tuple[nn.Module, ModelConfig]:
    """The model of that folder on the CPU, in training mode, in the number format it was saved in.

    The caller's random state is left alone. Raises `StoreError` where a file is missing or damaged, or where the
    weights are not those that the settings ask for, and `ParamsError` for settings that do not exist.
    """
    for file in (CONFIG, WEIGHTS):
        if not (folder / file).is_file():
            raise StoreError(f"{folder / file}: no such file; a model is a folder with {CONFIG} and {WEIGHTS}")
    config = read(ModelConfig, read_json(folder / CONFIG), key=CONFIG)
    try:
        tensors = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise StoreError(f"{folder / WEIGHTS}: damaged, {error}; train the model again or restore the file") from None
    with torch.random.fork_rng(devices=[]):
        model = build(config.architecture, config.vocab_size, config.context)
    _check_match(model, tensors, folder)
    for name, parameter in model.named_parameters():
        parameter.data = tensors[name]
    return model, config


def _check_match(model: nn.Module, tensors: dict[str, Tensor], folder: Path) -> None:
    wanted = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
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
