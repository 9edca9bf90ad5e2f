"""Stage `evaluate`: one trained model on the whole valid and test sets, and a sample of its text."""

from __future__ import annotations

import math
from pathlib import Path

from torch import nn
from tqdm import tqdm

from stacklm.config.evaluate import Evaluate, Sample
from stacklm.data.batches import evaluation_batches
from stacklm.data.shards import Shards
from stacklm.data.tokenizer import Tokenizer
from stacklm.evaluate.text import stream
from stacklm.files import write_json
from stacklm.model.cache import Decoder
from stacklm.model.store import load_model
from stacklm.train.machine import prepare
from stacklm.train.validate import Score, score


def evaluate(config: Evaluate, trained: Path, shards: Path, tokenizer: Path, evaluation: Path) -> None:
    """Score every token of the valid and test sets once and write the figures, with a sample, to `evaluation` (JSON).

    Raises `DataError` if the shards were made with another tokenizer than the one given.
    """
    device = prepare(config.device, config.threads)
    model, settings = load_model(trained)
    model = model.to(device).eval()
    words = Tokenizer.load(tokenizer)
    data = Shards.open(shards)
    data.check_tokenizer(words.digest)
    figures = {split: evaluate_split(model, data, split, settings.context, config.batch_size) for split in ("valid", "test")}
    sample = write_sample(Decoder(model, settings.context), words, config.sample)
    write_json(evaluation, {**figures, "sample": {"prompt": config.sample.prompt, "text": sample}})
    for split, figure in figures.items():
        print(f"evaluate: {split} loss {figure['loss']:.4f} nats/token, {figure['bits_per_byte']:.4f} bits per byte")


def evaluate_split(model: nn.Module, data: Shards, split: str, context: int, batch_size: int) -> dict[str, float]:
    """The figures of one split: `loss` over all tokens; `bits_per_byte` and `word_perplexity` without special tokens."""
    stream = data.split(split)
    batches = evaluation_batches(stream, context, batch_size)
    steps = math.ceil(len(stream) / (batch_size * context))
    result = score(model, tqdm(batches, total=steps, desc=f"evaluate {split}", unit="batch", mininterval=0.5), data.token_bytes)
    return {
        "tokens": result.tokens,
        "bytes": result.bytes,
        "words": stream.words,
        "loss": result.loss,
        "bits_per_byte": result.bits_per_byte,
        "word_perplexity": word_perplexity(result, stream.words),
    }


def word_perplexity(result: Score, words: int) -> float:
    """exp(nats per word) of the text, special tokens excluded. At most e**700, which is near the largest float."""
    return math.exp(min(result.text_nats / max(words, 1), 700))


def write_sample(decoder: Decoder, words: Tokenizer, settings: Sample) -> str:
    """The text with which the model continues the prompt of the settings."""
    pieces = stream(decoder, words, settings.prompt, settings)
    return "".join(tqdm(pieces, total=settings.tokens, desc="sample", unit="token", mininterval=0.5))
