"""The params.yaml in the repository, contradictions between values, and changing single values."""

from __future__ import annotations

from pathlib import Path

import pytest

from stacklm.config.optimizer import AdamW, Muon, Rest
from stacklm.config.params import load, parse, preview, section, set_values
from stacklm.config.schema import ParamsError, plain
from support import ROOT
from support.settings import changed, refusal

SHIPPED = ROOT / "params.yaml"


@pytest.fixture
def tree() -> dict:
    return plain(load(SHIPPED))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "params.yaml"
    path.write_text(SHIPPED.read_text(encoding="utf-8"), encoding="utf-8")
    return path


def test_the_shipped_file_compares_a_stacked_with_a_dense_model():
    kinds = {model.architecture.kind for model in load(SHIPPED).models.values()}
    assert kinds == {"stacked", "dense"}


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("models.stacked.architecture.stacks.0.features", 7, ["models.stacked.architecture", "features 7", "d_model"]),
        ("models.stacked.architecture.n_heads", 7, ["models.stacked.architecture", "heads: 7", "does not divide d_model"]),
        (
            "models.dense.optimizer.optimizer_in_backward",
            True,
            ["models.dense.optimizer.optimizer_in_backward", "max_grad_norm = 1 must be null"],
        ),
        ("seeds", [], ["seeds: [] is not allowed", "at least one"]),
        ("seeds", [1, 2, 1], ["seeds: [1, 2, 1] is not allowed", "different"]),
        ("tokenizer.special_tokens", ["<pad>"], ["tokenizer", "special_tokens", "<|endoftext|>"]),
        ("train.micro_batch_size", 5, ["train", "micro_batch_size: 5", "global_batch_size"]),
        ("train.warmup_steps", 10**6, ["train", "warmup_steps", "below max_steps"]),
        ("train.context_length", 10**7, ["train.context_length: 10000000", "data.source.max_bytes"]),
        ("data.valid_fraction", 0.97, ["data", "valid_fraction 0.97", "below 1"]),
        ("data.test_fraction", 0, ["data", "test_fraction", "> 0"]),
        ("data.source", {"kind": "huggingface", "name": "a/b", "revision": "main"}, ["revision: 'main'", "pin a commit"]),
    ],
)
def test_values_that_contradict_each_other_are_named(tree, key, value, words):
    message = refusal(changed(tree, key, value))
    assert [word for word in ["params.yaml", *words] if word not in message] == []


def test_an_optimizer_is_adamw_where_no_kind_is_named(tree):
    muon = {"kind": "muon", "peak_lr": 3e-3, "adamw": {"beta1": 0.8}}
    for settings, wanted in (({"peak_lr": 3e-3}, AdamW(peak_lr=3e-3)), (muon, Muon(peak_lr=3e-3, adamw=Rest(beta1=0.8)))):
        assert parse(changed(tree, "models.dense.optimizer", settings)).models["dense"].optimizer == wanted


def test_steps_in_backward_need_a_batch_in_one_pass_and_no_clipping(file):
    in_backward = ["models.dense.optimizer.kind=adafactor", "models.dense.optimizer.optimizer_in_backward=true"]
    params = set_values(file, [*in_backward, "train.max_grad_norm=null"])
    assert load(file) == params and params.train.max_grad_norm is None
    both = r"train\.micro_batch_size = 8 must be train\.global_batch_size = 16"
    with pytest.raises(ParamsError, match=rf"optimizer_in_backward: true .*{both}"):
        preview(file, ["train.micro_batch_size=8"])


def comments_of(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines() if line.lstrip().startswith("#")]


def test_set_values_keeps_comments_and_changes_only_what_is_named(file):
    before = load(file)
    changes = ["train.max_steps=77", "models.dense.optimizer.peak_lr=3e-3", "models.stacked.architecture.stacks.1.d_ff=96"]
    after = set_values(file, [*changes, "evaluate.sample.seed=9", "train.max_grad_norm=0.5"])  # the last two are not in the file
    assert load(file) == after
    assert (after.train.max_steps, after.evaluate.sample.seed, after.train.max_grad_norm) == (77, 9, 0.5)
    assert section(after, "models.dense.optimizer").peak_lr == 3e-3
    assert section(after, "models.stacked").architecture.stacks[1].d_ff == 96
    assert after.data == before.data
    assert comments_of(file) == comments_of(SHIPPED)


def test_preview_gives_what_set_values_would_write_and_writes_nothing(file):
    before = file.read_bytes()
    assert preview(file, ["train.max_steps=77"]).train.max_steps == 77
    with pytest.raises(ParamsError, match="warmup_steps"):
        preview(file, ["train.warmup_steps=1_000_000"])
    assert file.read_bytes() == before


SCALARS = """
1 1e3 1e-3 1.e3 +.5 .5 5. 017 0o17 0x1F 0b11 1_000 1_0.5 12e03 1:30 190:20:30 yes no on off y n true True TRUE null Null ~
.inf -.inf .nan .NaN 2024-01-01 2024-01-01T10:00:00Z +1 -0.0 -0 0.0 1e400 1e-400 '1' "1" "\\x00" 1,000 0.1.2 +inf inf nan
"""


def test_every_scalar_is_read_as_dvc_reads_it(tmp_path):
    """DVC decides by its own reading what is stale."""
    from dvc.utils.serialize import parse_yaml

    from stacklm.config.params import _load_yaml

    for text in SCALARS.split():
        line = f"key: {text}"
        assert repr(_load_yaml(line, "a line")) == repr(parse_yaml(line, "params.yaml")), text
    for settings in [SHIPPED, *(SHIPPED.parent / "docs" / "params").glob("*.yaml")]:
        load(settings)
        assert _load_yaml(settings.read_text(), "file") == parse_yaml(settings.read_text(), "params.yaml")


def test_a_file_has_seeds_and_no_seed_of_one_training(file: Path):
    with pytest.raises(ParamsError, match=r"params.yaml: train.seed: write `seeds: \[7\]` beside `models` instead"):
        set_values(file, ["train.seed=7"])
    file.write_text(file.read_text().replace("train:\n", "train:\n  seed: 7\n"))
    with pytest.raises(ParamsError, match=r"write `seeds: \[7\]`"):
        load(file)
