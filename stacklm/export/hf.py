"""A trained model as a folder that `transformers` loads, and that needs nothing else: weights, code, tokenizer, card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer as Fast
from tokenizers import processors
from transformers import GenerationConfig, PreTrainedTokenizerFast, logging

from stacklm.config.model import Dense, Python, Stacked
from stacklm.config.schema import ParamsError, plain
from stacklm.config.tokenizer import END_OF_TEXT
from stacklm.data.tokenizer import Tokenizer
from stacklm.export.source import bundle
from stacklm.files import sha256, write_text
from stacklm.model.build import ModelConfig
from stacklm.model.store import load_model

CODE = "stacklm.export.modeling_stacklm"
README = "README.md"


def export_hf(folder: Path, trained: Path, tokenizer: Path, card: str) -> None:
    """Write the folder. `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` loads it, an architecture of
    transformers itself without `trust_remote_code`.

    Raises `ParamsError` for a folder that holds something and for a model of the user's code; `StoreError` and `DataError` where
    model and tokenizer are damaged or do not belong together.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ParamsError(f"{folder}: is not empty; name a new folder")
    words = Tokenizer.load(tokenizer)
    model, config = load_model(trained, words.digest)
    if isinstance(config.architecture, Python):
        raise ParamsError(
            f"{trained}: a model of your own code, {config.architecture.path}, cannot be exported: only you know how transformers "
            "would decode with it; wrap it as https://huggingface.co/docs/transformers/custom_models says"
        )
    ends = {name: words.end_id for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    theirs = _as_transformers(model, config, ends)
    theirs.generation_config = GenerationConfig(**ends)
    logging.disable_progress_bar()
    theirs.save_pretrained(folder)
    if isinstance(config.architecture, (Dense, Stacked)):
        for name, text in bundle(CODE).items():
            write_text(folder / name, text)
    _save_tokenizer(folder, tokenizer, config.context_length)
    write_text(folder / README, card)
    for path in folder.glob("*.safetensors"):  # the library lets only its owner read them
        path.chmod((folder / README).stat().st_mode)
    files = sorted(path for path in folder.iterdir() if path.name != README)
    write_text(folder / "SHA256SUMS", "".join(f"{sha256(path)}  {path.name}\n" for path in files))


def _as_transformers(model: Any, config: ModelConfig, ends: dict[str, int]) -> Any:
    """The model with these weights as a `PreTrainedModel`."""
    if not isinstance(config.architecture, (Dense, Stacked)):
        model.net.model.config.update(ends)
        return model.net.model
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


def _save_tokenizer(folder: Path, tokenizer: Path, context: int) -> None:
    """The same ids; as documents do in training, a text begins behind an end token, and one that spells it is only text."""

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
