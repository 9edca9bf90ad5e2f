"""params.yaml as shipped, contradictions across values, and changing single values."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest

from stacklm.config.optimizer import AdamW, Muon, Rest
from stacklm.config.params import load, parse, preview, section, set_values
from stacklm.config.schema import ParamsError, plain

SHIPPED = Path(__file__).parent.parent / "params.yaml"


@pytest.fixture
def tree() -> dict:
    return plain(load(SHIPPED))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "params.yaml"
    path.write_text(SHIPPED.read_text(encoding="utf-8"), encoding="utf-8")
    return path


def change(tree: dict, key: str, value: object) -> dict:
    """A copy of `tree` with one value replaced."""
    tree = copy.deepcopy(tree)
    *path, last = key.split(".")
    place = tree
    for name in path:
        place = place[int(name)] if isinstance(place, list) else place[name]
    place[last] = value
    return tree


def test_the_shipped_file_compares_a_stacked_with_a_dense_model():
    kinds = {model.architecture.kind for model in load(SHIPPED).models.values()}
    assert kinds == {"stacked", "dense"}


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("models.stacked.architecture.stacks.0.features", 7, ["models.stacked.architecture", "features 7", "width"]),
        ("models.stacked.architecture.heads", 7, ["models.stacked.architecture", "heads: 7", "does not divide width"]),
        ("models.dense.architecture.kind", "dens", ["models.dense.architecture.kind", "'dens'", "did you mean `dense`?"]),
        ("models.dense.layers", 3, ["models.dense.layers", "unknown key"]),
        ("models.dense.optimizer.kind", "adam", ["models.dense.optimizer.kind", "'adam'", "did you mean `adamw`?"]),
        ("models.dense.optimizer.momentum", 0.9, ["optimizer.momentum", "unknown key of kind adamw", "one of kind muon"]),
        ("models.dense.optimizer.in_backward", True, ["models.dense.optimizer.in_backward", "clip_norm = 1 must be null"]),
        ("tokenizer.vocab_size", 100, ["tokenizer.vocab_size: 100", ">= 257"]),
        ("tokenizer.vocab_size", 2**33, ["tokenizer.vocab_size", "<= "]),
        ("tokenizer.special_tokens", ["<pad>"], ["tokenizer", "special_tokens", "<|endoftext|>"]),
        ("train.stepz", 3, ["train.stepz", "unknown key", "did you mean `steps`?"]),
        ("train.steps", "many", ["train.steps", "whole number", "'many'"]),
        ("train.micro_batch", 5, ["train", "micro_batch: 5", "batch_size"]),
        ("train.warmup_steps", 10**6, ["train", "warmup_steps", "below steps"]),
        ("train.context", 10**7, ["train.context: 10000000", "data.source.max_bytes"]),
        ("train.schedule", "cosin", ["train.schedule", "cosine, linear, wsd", "did you mean `cosine`?"]),
        ("data.valid_fraction", 0.97, ["data", "valid_fraction 0.97", "below 1"]),
        ("data.test_fraction", 0, ["data", "test_fraction", "> 0"]),
        ("data.source.kind", "file", ["data.source.kind", "stdlib, files, huggingface", "did you mean `files`?"]),
        ("data.source", {"kind": "huggingface", "name": "a/b", "revision": "main"}, ["revision: 'main'", "pin a commit"]),
        ("models", {}, ["models", "at least one"]),
        ("models", {"a/b": {}}, ["models.a/b"]),
        ("trian", {}, ["trian", "unknown key", "did you mean `train`?"]),
    ],
)
def test_values_that_contradict_or_exceed_are_named(tree, key, value, words):
    with pytest.raises(ParamsError) as caught:
        parse(change(tree, key, value))
    for word in ["params.yaml", *words]:
        assert word in str(caught.value)


def test_an_optimizer_is_adamw_where_no_kind_is_named(tree):
    assert parse(change(tree, "models.dense.optimizer", {"peak_lr": 3e-3})).models["dense"].optimizer == AdamW(peak_lr=3e-3)
    muon = {"kind": "muon", "peak_lr": 3e-3, "rest": {"beta1": 0.8}}
    assert parse(change(tree, "models.dense.optimizer", muon)).models["dense"].optimizer == Muon(peak_lr=3e-3, rest=Rest(beta1=0.8))


def test_steps_in_backward_need_a_batch_in_one_pass_and_no_clipping(file):
    in_backward = ["models.dense.optimizer.kind=adafactor", "models.dense.optimizer.in_backward=true"]
    params = set_values(file, [*in_backward, "train.clip_norm=null"])
    assert load(file) == params and params.train.clip_norm is None
    with pytest.raises(ParamsError, match=r"in_backward: true .*train\.micro_batch = 8 must be train\.batch_size = 16"):
        preview(file, ["train.micro_batch=8"])


def test_set_values_keeps_comments_and_changes_only_what_is_named(file):
    before = load(file)
    after = set_values(
        file, ["train.steps=77", "models.dense.optimizer.peak_lr=3e-3", "models.stacked.architecture.stacks.1.hidden=96"]
    )
    assert load(file) == after
    assert after.train.steps == 77
    assert section(after, "models.dense.optimizer").peak_lr == 3e-3
    assert section(after, "models.stacked").architecture.stacks[1].hidden == 96
    assert after.data == before.data
    assert [line for line in SHIPPED.read_text().splitlines() if line.lstrip().startswith("#")] == [
        line for line in file.read_text().splitlines() if line.lstrip().startswith("#")
    ]


def test_set_values_can_set_what_the_file_leaves_out(file):
    assert set_values(file, ["train.clip_norm=0.5", "evaluate.sample.seed=9"]).train.clip_norm == 0.5
    assert load(file).evaluate.sample.seed == 9


@pytest.mark.parametrize(
    ("assignment", "word"),
    [
        ("train.steps", "key=value"),
        ("train.stepz=3", "did you mean `steps`?"),
        ("trian.steps=3", "did you mean `train`?"),
        ("train.steps=0", ">= 1"),
        ("models.stacked.architecture.stacks.9.hidden=3", "no index"),
        ("train.steps=[1", "not valid YAML"),
    ],
)
def test_a_wrong_assignment_changes_nothing(file, assignment, word):
    before = file.read_bytes()
    with pytest.raises(ParamsError, match=word.replace("?", r"\?")):
        set_values(file, [assignment])
    assert file.read_bytes() == before


def test_numbers_are_read_as_dvc_reads_them(file):
    file.write_text(file.read_text().replace("peak_lr: 2e-3", "peak_lr: 1e-3"))
    assert load(file).models["stacked"].optimizer.peak_lr == 1e-3


def test_broken_yaml_and_a_missing_file_are_params_errors(tmp_path):
    with pytest.raises(ParamsError, match="no such file"):
        load(tmp_path / "params.yaml")
    (tmp_path / "params.yaml").write_text("a: [1")
    with pytest.raises(ParamsError, match="not valid YAML"):
        load(tmp_path / "params.yaml")


def test_preview_gives_what_set_values_would_write_and_writes_nothing(file):
    before = file.read_bytes()
    assert preview(file, ["train.steps=77"]).train.steps == 77
    with pytest.raises(ParamsError, match="warmup_steps"):
        preview(file, ["train.warmup_steps=1_000_000"])
    assert file.read_bytes() == before
