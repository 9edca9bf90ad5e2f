from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from stacklm.config.evaluate import Sample
from stacklm.config.tokenizer import TokenizerConfig
from stacklm.data import DataError
from stacklm.data.documents import read_split
from stacklm.data.shards import Shards
from stacklm.data.tokenizer import Tokenizer, train_tokenizer
from stacklm.evaluate import evaluate as module
from stacklm.evaluate import generate as text
from stacklm.evaluate.evaluate import evaluate, word_perplexity
from stacklm.model.store import StoreError, load_model, save_model
from stacklm.train.validate import Score
from support.evaluated import CONFIG, Project
from support.train_files import MODELS, TRAIN


def test_a_uniform_model_scores_ln_v_and_the_rest_follows_by_hand(project: Project) -> None:
    figures = project.evaluate(project.save("uniform", "stacked", uniform=True))
    for split in ("valid", "test"):
        stream = Shards.open(project.shards).split(split)
        assert figures[split]["tokens"] == len(stream)
        assert figures[split]["bytes"] == stream.bytes
        assert figures[split]["words"] == stream.words
        assert figures[split]["loss"] == pytest.approx(math.log(280), rel=1e-7)
        text_tokens = len(stream) - stream.documents
        assert figures[split]["bits_per_byte"] == pytest.approx(text_tokens * math.log2(280) / stream.bytes, rel=1e-7)
        assert figures[split]["word_perplexity"] == pytest.approx(280 ** (text_tokens / stream.words), rel=1e-5)


def test_every_token_is_scored_once_in_its_context(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def collecting(model: nn.Module, batches, token_bytes_V):
        for inputs_BT, targets_BT, mask_BT in batches:
            seen.append((inputs_BT[mask_BT], targets_BT[mask_BT]))
        return Score(1, 1.0, 1.0, 1)

    monkeypatch.setattr(module, "score", collecting)
    project.evaluate(project.save("any"))
    shards = Shards.open(project.shards)
    stream = torch.from_numpy(shards.split("valid")[:])
    inputs, targets = (torch.cat(part)[: len(stream)] for part in zip(*seen, strict=True))
    assert torch.equal(targets, stream)
    assert torch.equal(inputs, torch.cat([torch.tensor([shards.end_id]), stream[:-1]]))
    assert sum(len(part) for _, part in seen) == len(stream) + len(shards.split("test"))


@pytest.mark.parametrize("kind", MODELS)
def test_the_batch_size_changes_nothing_but_rounding(project: Project, kind: str) -> None:
    name = project.save(f"batches-{kind}", kind)
    results = [project.evaluate(name, replace(CONFIG, batch_size=batch_size)) for batch_size in (1, 5, 64)]
    for split in ("valid", "test"):
        for result in results[1:]:
            assert result[split] == pytest.approx(results[0][split], rel=1e-6)
        assert results[0][split]["loss"] != pytest.approx(math.log(280), rel=1e-6)


def test_equal_calls_write_equal_bytes(project: Project) -> None:
    name = project.save("twice", "stacked")
    project.evaluate(name)
    first = (project.root / "twice.json").read_bytes()
    project.evaluate(name)
    assert (project.root / "twice.json").read_bytes() == first


def test_the_sample_is_text_whatever_the_model_says(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes that are no UTF-8 are replaced, and the text ends with its document."""
    tokenizer = Tokenizer.load(project.tokenizer)
    stray = tokenizer.encode(b"\xc3")
    said = [*tokenizer.encode(" sum"), *stray, tokenizer.end_id, *tokenizer.encode("next")]
    asked = []
    monkeypatch.setattr(text, "generate", lambda decoder, ids, settings: asked.append(ids) or iter(said))
    figures = project.evaluate(project.save("speaker"))
    assert figures["sample"] == {"prompt": "the", "text": " sum\ufffd"}
    assert asked == [[tokenizer.end_id, *tokenizer.encode("the")]]


def test_a_sample_is_written(project: Project) -> None:
    figures = project.evaluate(
        project.save("writer", uniform=True), replace(CONFIG, sample=Sample(prompt="", max_new_tokens=40, top_k=0))
    )
    assert len(figures["sample"]["text"]) > 20


def test_shards_of_another_tokenizer_are_refused(project: Project, tmp_path: Path) -> None:
    train_tokenizer(TokenizerConfig(280, "gpt2"), project.root / "documents", tmp_path / "other")
    name = project.save("refused", tokenizer=Tokenizer.load(tmp_path / "other").digest)
    with pytest.raises(DataError, match="made with tokenizer"):
        outputs = tmp_path / "evaluation.json", tmp_path / "certificate.json"
        inputs = project.root / name, project.shards, tmp_path / "other", tmp_path / "benchmarks.json"
        evaluate(CONFIG, TRAIN, *inputs, *outputs)


def test_a_model_of_another_tokenizer_is_refused(project: Project) -> None:
    name = project.save("foreign", tokenizer="0" * 64)
    with pytest.raises(StoreError, match=r"trained with tokenizer 0{64}, not with"):
        project.evaluate(name)


def test_a_model_that_knows_single_tokens_scores_their_bits_over_whole_splits(project: Project) -> None:
    """Each token has its own probability whatever comes before: the sums over all of valid and of test are known."""
    name = project.save("unigram", "stacked")
    model, settings = load_model(project.root / name)
    assert model.head.bias is not None
    logits_V = torch.linspace(-3, 3, project.vocab_size)
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.copy_(logits_V)
    save_model(project.root / name, model, settings.architecture, settings.vocab_size, settings.context_length, project.digest)
    figures = project.evaluate(name)
    nats_V = -(logits_V.double() - logits_V.double().logsumexp(0)).numpy()
    for split in ("valid", "test"):
        ids = Shards.open(project.shards).split(split)[:]
        bytes_ = sum(map(len, read_split(project.root / "documents", split)))
        text = ids != 0
        assert figures[split]["loss"] == pytest.approx(nats_V[ids].mean(), rel=1e-6)
        assert figures[split]["bits_per_byte"] == pytest.approx(nats_V[ids[text]].sum() / math.log(2) / bytes_, rel=1e-6)
    assert figures["valid"]["loss"] != pytest.approx(figures["test"]["loss"], rel=1e-4)


def test_word_perplexity_is_always_a_number() -> None:
    assert word_perplexity(Score(tokens=9, nats=9.0, text_nats=6.0, bytes=1), words=3) == pytest.approx(math.exp(2))
    assert word_perplexity(Score(tokens=9, nats=9.0, text_nats=6.0, bytes=1), words=0) == pytest.approx(math.exp(6))
    assert math.isfinite(word_perplexity(Score(tokens=9, nats=9e9, text_nats=9e9, bytes=1), words=1))
