"""The notes are Markdown, in which generated text and users' names are escaped."""

from __future__ import annotations

import pytest
from markdown_it import MarkdownIt

from stacklm.pipeline.tracking.pages import run_note

FACTS = {
    "size": {"model/parameters": 9, "model/body_parameters": 5, "model/training_flops_per_token": 7},
    "params": {
        "train.max_steps": 1,
        "train.global_batch_size": 1,
        "train.context_length": 8,
        "architecture.kind": "dense",
        "architecture.n_layers": 1,
    },
    "data": {"name": "stdlib", "vocab_size": 32, "splits": {"train": {"tokens": 8, "bytes": 16}}},
}
HOSTILE = [
    "a `b` | c",
    "```\n# heading\n```",
    "`" * 40,
    "<script>alert(1)</script>",
    "\n\n    *x* [a](b)\n",
    "~~~\n| a | b |\n|---|---|",
]


@pytest.mark.parametrize(
    ("architecture", "shape"),
    [
        ({"kind": "python", "path": "a_`b`.py", "class": "Mine"}, "A model of the user's code, `` Mine of a_`b`.py ``"),
        ({"kind": "huggingface", "config": "LlamaConfig"}, "A transformers model, ` LlamaConfig `"),
    ],
)
def test_models_from_elsewhere_are_named(architecture, shape):
    params = FACTS["params"] | {f"architecture.{key}": value for key, value in architecture.items()}
    assert shape in run_note({**FACTS, "params": params}, None)


@pytest.mark.parametrize("text", HOSTILE)
def test_what_is_quoted_stays_as_it_is(text):
    split = {"bits_per_byte": 1.0, "loss": 1.0, "word_perplexity": 1.0}
    evaluation = {"valid": split, "test": split, "sample": {"prompt": text, "text": text}}
    facts = {**FACTS, "data": {**FACTS["data"], "name": text}}
    tokens = MarkdownIt("commonmark").enable("table").parse(run_note(facts, evaluation))
    assert [token.content for token in tokens if token.type == "fence"] == [f"{text}\n"] * 2
    assert not [token for token in tokens if token.type in ("heading_open", "html_block", "code_block", "hr")]
    inline = [child for token in tokens if token.children for child in token.children]
    assert [child.content for child in inline if child.type == "code_inline"] == [" ".join(text.split())]
    assert sum(token.type == "table_open" for token in tokens) == 1
