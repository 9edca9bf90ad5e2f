"""A stacked or dense model of stacklm as a `transformers` model: loss, `generate` with a cache, `Trainer`.

This file is copied to every exported folder, with the parts of stacklm that it needs (`stacklm.export.source`), so the folder
loads without stacklm. The computation is that of stacklm's own modules, whose parameters keep their names.

Dimension letters: B batch, T time, W features, V vocabulary.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from stacklm.config.model import Dense, FactoredAttention, PublishedAttention, Stack, Stacked
from stacklm.model.cache import KEYS_AND_VALUES, Cache, CachedConv, with_cache
from stacklm.model.dense import DenseDecoder
from stacklm.model.stacked import StackedDecoder

SUMS = "SHA256SUMS"
ATTENTIONS = {"published": PublishedAttention, "factored": FactoredAttention}
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
"""Name of the cache in a model's output in this version of transformers."""


class StacklmConfig(PreTrainedConfig):
    """`architecture` as in stacklm's params.yaml, vocabulary size and context length."""

    model_type = "stacklm"
    attribute_map = {"max_position_embeddings": "context_length", "num_hidden_layers": "depth"}  # noqa: RUF012

    def __init__(
        self, architecture: dict[str, Any] | None = None, vocab_size: int = 257, context_length: int = 1, **kwargs: Any
    ) -> None:
        self.architecture = architecture or {"kind": "dense", "d_model": 2, "n_heads": 1, "n_layers": 1, "d_ff": 1}
        self.vocab_size, self.context_length = vocab_size, context_length
        settings = self.settings
        self.hidden_size, self.num_attention_heads, self.depth = settings.d_model, settings.n_heads, settings.depth(context_length)
        super().__init__(**{**kwargs, "tie_word_embeddings": settings.tie_embeddings})

    @property
    def settings(self) -> Dense | Stacked:
        """The architecture as its dataclass."""
        given = dict(self.architecture)
        if given.pop("kind") == "dense":
            return Dense(**given)
        stacks = tuple(Stack(**stack) for stack in given.pop("stacks"))
        attention = dict(given.pop("attention"))
        return Stacked(stacks=stacks, attention=ATTENTIONS[attention.pop("kind")](**attention), **given)


class StacklmCache:
    """The cache of all sequences of a batch, and a copy of the modules that uses it."""

    is_linear = (False,)
    is_compileable = is_croppable = False

    def __init__(self, model: StacklmForCausalLM) -> None:
        if model.training:
            raise ValueError("the model is in training mode, where dropout changes its features; call its `eval` first")
        self.kept = Cache(model.config.context_length)
        self.twin = with_cache(model, KEYS_AND_VALUES, self.kept)

    @torch.no_grad()
    def features(self, ids_BT: Tensor) -> Tensor:
        """Return the features of the next tokens, [B, T, W]. Raises `ValueError` if all tokens together exceed the context."""
        tokens = self.kept.tokens + ids_BT.shape[1]
        if tokens > self.kept.context:
            raise ValueError(f"{tokens} tokens are more than the model's context of {self.kept.context}; generate fewer")
        self.kept.tokens = tokens
        return self.twin.features(ids_BT)

    def get_seq_length(self) -> int:
        """Return the number of tokens in the cache."""
        return self.kept.tokens

    def reorder_cache(self, beams_B: Tensor) -> None:
        """Replace row b of the cache by row `beams_B[b]`."""
        for past in self.kept._pasts:
            past._room = None if past._room is None else past._room.index_select(0, beams_B)
        for module in self.twin.modules():
            if isinstance(module, CachedConv):
                module.before = module.before.index_select(0, beams_B)


class StacklmForCausalLM(PreTrainedModel, GenerationMixin):
    """ids [B, T] to logits [B, T, V], for T up to `config.context_length`.

    `attention_mask` may mask tokens at both ends of a row (padding), not in between.
    """

    config_class = StacklmConfig
    config: StacklmConfig
    _tied_weights_keys = {"head.weight": "embedding.weight"}  # noqa: RUF012
    _no_split_modules = ["Block", "ParallelStack"]  # noqa: RUF012
    _is_stateful = True  # what was read is not taken back, as assisted decoding does
    supports_gradient_checkpointing = True
    gradient_checkpointing = False

    def __init__(self, config: StacklmConfig) -> None:
        super().__init__(config)
        build = DenseDecoder if config.architecture["kind"] == "dense" else StackedDecoder
        decoder = build(config.settings, config.vocab_size, config.context_length)
        self.kind = build
        self.frozen = [name for name, parameter in decoder.named_parameters() if not parameter.requires_grad]
        self.__dict__.update({name: value for name, value in vars(decoder).items() if name not in vars(self)})
        for name, module in decoder.named_children():
            self.add_module(name, module)
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, but raises `ValueError` if files differ from the exported ones, or weights do not fit."""
        verify(Path(pretrained_model_name_or_path))
        asked = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        if wrong := {what: sorted(map(str, names)) for what, names in info.items() if names}:
            raise ValueError(f"{pretrained_model_name_or_path}: the weights do not fit config.json: {wrong}")
        for name in model.frozen:  # loading makes all of them trainable
            model.get_parameter(name).requires_grad_(False)
        return (model, info) if asked else model

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Do nothing: modules initialise their own weights in their constructors."""

    @property
    def activation_checkpointing(self) -> bool:
        return self.gradient_checkpointing and self.training

    def get_input_embeddings(self) -> Any:
        return self.embedding

    def get_output_embeddings(self) -> Any:
        return self.head

    def features(self, ids_BT: Tensor) -> Tensor:
        """Return the input of the head, [B, T, W]."""
        return self.kind.features(self, ids_BT)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        num_items_in_batch: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Return logits, with `labels` (unshifted; -100 is ignored) the mean loss, and with `use_cache` the cache.

        Raises `ValueError` for arguments that would have no effect.
        """
        if unknown := [name for name, value in kwargs.items() if value is not None and value is not False]:
            raise ValueError(f"this model takes no {', '.join(unknown)}")
        cache = past_key_values if cache is None else cache
        begun = cache is not None and cache.get_seq_length() > 0
        if begun and not isinstance(cache, StacklmCache):
            raise ValueError(f"a {type(cache).__name__} is not a cache of this model; leave it out, and take the one it returns")
        padded = attention_mask is not None and not attention_mask.all()
        if padded and (use_cache or begun):
            raise ValueError("with padding there is no cache: pass use_cache=False, as `generate` does")
        if use_cache or begun:
            cache = cache if begun else StacklmCache(self)
            features_BTW = cache.features(input_ids)
        elif padded:
            features_BTW = self._of_padded(input_ids, attention_mask)
        else:
            features_BTW = self.features(input_ids)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits_BTV = self.head(features_BTW[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits_BTV, labels, self.config.vocab_size, num_items_in_batch=num_items_in_batch)
        found = CausalLMOutputWithPast(loss=loss, logits=logits_BTV, **({CACHE: cache} if use_cache or begun else {}))
        return found.to_tuple() if return_dict is False else found

    def generate(self, inputs: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, but without `attention_mask` no token is masked. Prompts of different lengths, padded on the left,
        are recomputed for each new token.
        """
        ids_BT = kwargs.get("input_ids") if inputs is None else inputs
        if ids_BT is not None and kwargs.get("attention_mask") is None:
            kwargs["attention_mask"] = torch.ones_like(ids_BT)
        if ids_BT is not None and not kwargs["attention_mask"].all():
            kwargs["use_cache"] = False
        return super().generate(inputs, *args, **kwargs)

    def _of_padded(self, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """Return features of rows that start with padding: each row is rotated to put its padding last, and rotated back."""
        first_B1 = mask_BT.int().argmax(dim=1, keepdim=True)
        steps_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
        left_BT, back_BT = (steps_T + first_B1) % len(steps_T), (steps_T - first_B1) % len(steps_T)
        if (mask_BT.gather(1, left_BT).int().diff(dim=1) > 0).any():
            raise ValueError("attention_mask leaves out tokens among others of a row; only padding at its ends can be left out")
        features_BTW = self.features(ids_BT.gather(1, left_BT))
        return features_BTW.gather(1, back_BT[..., None].expand_as(features_BTW))


def verify(folder: Path) -> None:
    """Raise `ValueError` if a file of an exported folder differs from its list of SHA-256; without a list, do nothing."""
    if not (folder / SUMS).is_file():
        return
    for line in (folder / SUMS).read_text(encoding="utf-8").splitlines():
        digest, _, name = line.partition("  ")
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name}: missing, but listed in {SUMS}")
        with (folder / name).open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                raise ValueError(
                    f"{folder / name}: not what {SUMS} lists; export again, or remove {SUMS} if you changed it yourself"
                )
