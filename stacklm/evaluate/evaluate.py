"""Stage `evaluate`: scores of one trained model on the whole valid and test sets and on benchmarks, and a generated sample."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

from stacklm.audit.audit import audit_trained
from stacklm.config.evaluate import Evaluate
from stacklm.config.train import Train
from stacklm.data.batches import evaluation_batches
from stacklm.data.benchmarks import read_listed
from stacklm.data.shards import Shards
from stacklm.data.tokenizer import Tokenizer
from stacklm.evaluate.benchmarks import Scorer, run_benchmarks
from stacklm.evaluate.generate import stream
from stacklm.files import write_json
from stacklm.model.cache import Decoder
from stacklm.model.layers import LanguageModel
from stacklm.model.store import load_model
from stacklm.progress import progress
from stacklm.train.device import setup_device
from stacklm.train.validate import Score, score


def evaluate(
    config: Evaluate,
    train: Train,
    trained: Path,
    shards: Path,
    tokenizer: Path,
    benchmarks: Path,
    evaluation: Path,
    certificate: Path,
) -> None:
    """Score every token of the valid and test sets once, and the benchmarks listed in the file `benchmarks`, and write the
    figures, with a generated sample, to `evaluation` (JSON).

    The trained weights are audited first, and their `certificate` is written. Raises `AuditError` if the model is not causal,
    `StoreError` if it was trained with another tokenizer, and `DataError` if the shards were made with another tokenizer or a
    benchmark changed since it was listed.
    """
    words = Tokenizer.load(tokenizer)
    audit_trained(trained, train, certificate)
    device = setup_device(config.device, config.threads)
    model, settings = load_model(trained, words.digest)
    model = model.to(device).eval()
    data = Shards.open(shards)
    data.check_tokenizer(words.digest)
    figures = {split: evaluate_split(model, data, split, settings.context_length, config.batch_size) for split in ("valid", "test")}
    scorer, read = Scorer(model, settings.context_length, words), partial(read_listed, listing=benchmarks)
    scores = run_benchmarks(scorer, config.benchmarks, read)
    pieces = stream(Decoder(model, settings.context_length), words, config.sample.prompt, config.sample)
    sample = "".join(progress(pieces, total=config.sample.max_new_tokens, desc="sample", unit="token"))
    write_json(evaluation, {**figures, "benchmarks": scores, "sample": {"prompt": config.sample.prompt, "text": sample}})
    for split, figure in figures.items():
        print(f"evaluate: {split} loss {figure['loss']:.4f} nats/token, {figure['bits_per_byte']:.4f} bits per byte")


def evaluate_split(model: LanguageModel, data: Shards, split: str, context: int, batch_size: int) -> dict[str, float]:
    """Return the figures of one split: `loss` over all tokens; `bits_per_byte` and `word_perplexity` without special tokens."""
    stream = data.split(split)
    batches = evaluation_batches(stream, context, batch_size)
    steps = math.ceil(len(stream) / (batch_size * context))
    result = score(model, progress(batches, total=steps, desc=f"evaluate {split}", unit="batch"), data.token_bytes)
    return {
        "tokens": result.tokens,
        "bytes": result.bytes,
        "words": stream.words,
        "loss": result.loss,
        "bits_per_byte": result.bits_per_byte,
        "word_perplexity": word_perplexity(result, stream.words),
    }


def word_perplexity(result: Score, words: int) -> float:
    """Return exp(nats per word), special tokens excluded, capped at e**700, which is near the largest float."""
    return math.exp(min(result.text_nats / max(words, 1), 700))
