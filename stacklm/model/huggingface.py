"""A model from `transformers`.

Dimension letters: B batch, T time, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from fnmatch import fnmatchcase
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from stacklm.config.model import HuggingFace
from stacklm.config.schema import ParamsError, nearest
from stacklm.model.custom import Custom

CACHES = ("cache", "past_key_values", "cache_params", "state")
"""Names of the cache among models' arguments and outputs."""


NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
"""Special-token ids, unset: the defaults are for another vocabulary."""


class CausalLM(nn.Module):
    """Maps ids [B, T] to logits [B, T, V]; `decode` gives those of the next tokens with the model's own cache."""

    def __init__(self, model: Any, roles: Mapping[str, str]) -> None:
        super().__init__()
        self.model, self._roles = model, roles

    def forward(self, ids_BT: Tensor) -> Tensor:
        return self.model(input_ids=ids_BT, use_cache=False).logits

    def decode(self, ids_BT: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
        """The logits of the next tokens, and the cache as a keyword argument of the model; all ids if it has no cache."""
        if isinstance(cache, Tensor):
            ids_BT, new = torch.cat([cache, ids_BT], dim=1), ids_BT.shape[1]
            return self.forward(ids_BT)[:, -new:], ids_BT
        found = self.model(input_ids=ids_BT, use_cache=True, **(cache or {}))
        name = next((name for name in CACHES if found.get(name) is not None), None)
        return found.logits, {name: found[name]} if name else ids_BT

    def role_of(self, name: str) -> str | None:
        """The role by the patterns of the settings; None: by the module's type, else by dimensions, matrix or vector."""
        return next((role for pattern, role in self._roles.items() if fnmatchcase(name.removeprefix("model."), pattern)), None)


def from_transformers(architecture: HuggingFace, vocab_size: int, context: int) -> Custom:
    """A model with fresh weights. Raises `ParamsError` if it cannot be built from the settings."""
    transformers = _library()
    kind = getattr(transformers, architecture.config, None)
    base = transformers.PretrainedConfig
    if not (isinstance(kind, type) and issubclass(kind, base)):
        names = [name for name in dir(transformers) if name.endswith("Config")]
        raise ParamsError(f"config: transformers has no configuration {architecture.config}{nearest(architecture.config, names)}")
    sizes = {"vocab_size": vocab_size, "max_position_embeddings": context}
    try:
        model = transformers.AutoModelForCausalLM.from_config(kind(**{**architecture.settings, **NO_TOKENS, **sizes}))
    except NotImplementedError:  # from reading values of a meta tensor
        raise
    except Exception as error:
        raise ParamsError(f"settings: no {architecture.config} can be made of them: {type(error).__name__}: {error}") from error
    return Custom(CausalLM(model, architecture.roles), type(model).__name__, vocab_size, context, nullcontext)


def pretrained(path: str, context: int) -> tuple[Custom, HuggingFace, Callable[..., Custom]]:
    """A model from a local folder or the hub, for sequences of up to `context` tokens; its configuration; and a function that
    builds it with fresh weights: in the same shape, or for another vocabulary and context.

    No downloaded code is executed, and weights are read only from safetensors. Raises `ParamsError` if that is not possible.
    """
    transformers = _library()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            path, trust_remote_code=False, use_safetensors=True, dtype=torch.float32
        )
    except Exception as error:
        raise ParamsError(f"hf:{path}: {error}") from error
    shape = model.config
    vocabulary, longest = shape.vocab_size, min(context, getattr(shape, "max_position_embeddings", context))

    def build(architecture: HuggingFace, vocab_size: int, context: int) -> Custom:
        if (vocab_size, context) != (vocabulary, longest):
            return from_transformers(architecture, vocab_size, context)
        return wrapped(transformers.AutoModelForCausalLM.from_config(shape, dtype=torch.float32))

    def wrapped(model: Any) -> Custom:
        return Custom(CausalLM(model, {}), type(model).__name__, vocabulary, longest, nullcontext)

    return wrapped(model), HuggingFace(type(shape).__name__, settings=json.loads(shape.to_json_string())), build


def _library() -> Any:
    try:
        transformers = import_module("transformers")  # so that type checkers do not read all of it
    except ImportError:
        raise ParamsError("kind: huggingface needs transformers: `pip install 'stacklm[huggingface]'`") from None
    transformers.logging.set_verbosity_error()
    return transformers
