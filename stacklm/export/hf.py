"""Export a trained model as a self-contained folder that `transformers` loads: weights, code, tokenizer, card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer as Fast
from tokenizers import processors
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, logging

from stacklm.config.model import Architecture, Dense, HuggingFace, Python
from stacklm.config.schema import ParamsError, plain
from stacklm.config.tokenizer import END_OF_TEXT
from stacklm.data.tokenizer import Tokenizer
from stacklm.export.source import bundle
from stacklm.files import sha256, write_text
from stacklm.model.build import ModelConfig
from stacklm.model.dense import DenseDecoder
from stacklm.model.layers import SLOWEST
from stacklm.model.store import load_model

CODE = "stacklm.export.modeling_stacklm"
README = "README.md"


def export_hf(folder: Path, trained: Path, tokenizer: Path, card: str) -> None:
    """Write the folder. `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` loads it; if the architecture
    `is_native`, without `trust_remote_code`.

    Raises `ParamsError` for a folder that is not empty and for a model of the user's code; `StoreError` and `DataError` if model
    or tokenizer are damaged or do not belong together.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ParamsError(f"{folder}: not empty; name a new folder")
    words = Tokenizer.load(tokenizer)
    model, config = load_model(trained, words.digest)
    if isinstance(config.architecture, Python):
        raise ParamsError(
            f"{trained}: a model of your own code, {config.architecture.path}, cannot be exported: only you know how transformers "
            "should decode with it; wrap it as described in https://huggingface.co/docs/transformers/custom_models"
        )
    ends = {name: words.end_id for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    theirs = _as_transformers(model, config, ends)
    theirs.generation_config = GenerationConfig(**ends)
    logging.disable_progress_bar()
    theirs.save_pretrained(folder)
    if not is_native(config.architecture):
        for name, text in bundle(CODE).items():
            write_text(folder / name, text)
    _save_tokenizer(folder, tokenizer, config.context_length)
    write_text(folder / README, card)
    for path in folder.glob("*.safetensors"):  # transformers makes them readable by their owner only
        path.chmod((folder / README).stat().st_mode)
    files = sorted(path for path in folder.iterdir() if path.name != README)
    write_text(folder / "SHA256SUMS", "".join(f"{sha256(path)}  {path.name}\n" for path in files))


def _as_transformers(model: Any, config: ModelConfig, ends: dict[str, int]) -> Any:
    """Return the model, with its weights, as a `PreTrainedModel`."""
    if isinstance(config.architecture, HuggingFace):
        model.net.model.config.update(ends)
        return model.net.model
    if isinstance(config.architecture, Dense) and is_native(config.architecture):
        return _as_qwen3(model, config.architecture, config, ends)
    from stacklm.export.modeling_stacklm import StacklmConfig, StacklmForCausalLM

    modeling = CODE.rpartition(".")[2]
    settings = StacklmConfig(
        architecture=plain(config.architecture),
        vocab_size=config.vocab_size,
        context_length=config.context_length,
        auto_map={"AutoConfig": f"{modeling}.StacklmConfig", "AutoModelForCausalLM": f"{modeling}.StacklmForCausalLM"},
        **ends,
    )
    with torch.random.fork_rng(devices=[]):
        theirs = StacklmForCausalLM(settings)
    theirs.load_state_dict(model.state_dict())
    return theirs


def is_native(architecture: Architecture) -> bool:
    """Return whether transformers has this architecture: `kind: huggingface`, or a dense model with all parts as in Qwen3."""
    if isinstance(architecture, Dense):
        return architecture.ffn == "swiglu" and architecture.conv_size == 1 and architecture.skip_connections == "none"
    return isinstance(architecture, HuggingFace)


QWEN3 = {
    "attention_norm": "input_layernorm",
    "attention.query": "self_attn.q_proj",
    "attention.query_norm": "self_attn.q_norm",
    "attention.key": "self_attn.k_proj",
    "attention.key_norm": "self_attn.k_norm",
    "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.o_proj",
    "feed_forward_norm": "post_attention_layernorm",
    "feed_forward.gate": "mlp.gate_proj",
    "feed_forward.up": "mlp.up_proj",
    "feed_forward.down": "mlp.down_proj",
}
"""Module names of a layer, here and in Qwen3."""


def _as_qwen3(model: DenseDecoder, settings: Dense, config: ModelConfig, ends: dict[str, Any]) -> Any:
    """Return a `Qwen3ForCausalLM` (arXiv:2505.09388) that computes the same function. Qwen3 has no norm after the embedding: this
    norm acts on each token alone, so the embedding table is stored normalised, and a tied head separately."""
    shape = Qwen3Config(
        vocab_size=config.vocab_size,
        hidden_size=settings.d_model,
        intermediate_size=settings.d_ff,
        num_hidden_layers=settings.n_layers,
        num_attention_heads=settings.n_heads,
        num_key_value_heads=settings.n_heads,
        head_dim=model.head_dim,
        max_position_embeddings=config.context_length,
        rms_norm_eps=torch.finfo(torch.float32).eps,
        rope_parameters={"rope_type": "default", "rope_theta": SLOWEST},
        tie_word_embeddings=False,
        **ends,
    )
    weights = {"model.norm.weight": model.norm.weight, "lm_head.weight": model.head.weight}
    weights["model.embed_tokens.weight"] = model.embedding_norm(model.embedding.weight)
    for n, block in enumerate(model.blocks):
        weights |= {f"model.layers.{n}.{QWEN3[name.removesuffix('.weight')]}.weight": w for name, w in block.named_parameters()}
    with torch.random.fork_rng(devices=[]):
        theirs = Qwen3ForCausalLM(shape)
    theirs.load_state_dict(weights)
    return theirs


def _save_tokenizer(folder: Path, tokenizer: Path, context: int) -> None:
    """Save the tokenizer. As in training, a text starts after an end token; its spelling inside a text is plain text."""

    fast = Fast.from_file(str(tokenizer / "tokenizer.json"))
    fast.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A",
        pair=f"{END_OF_TEXT} $A {END_OF_TEXT} $B",
        special_tokens=[(END_OF_TEXT, fast.token_to_id(END_OF_TEXT))],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=fast,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        padding_side="left",
        model_max_length=context,
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
    ).save_pretrained(folder)
