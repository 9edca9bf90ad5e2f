"""The texts that explain, in MLflow's pages, a run and the experiment. Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stacklm.report.units import count, quantity

EXPERIMENT_NOTE = """\
**Language models that differ in one thing: how their layers are connected.** Every run is one pretraining.

- **Who is better?** Select the runs and look at `test/bits_per_byte`: lower is better, and it does not depend on the tokenizer.
- **Is it fair?** Compare `model/body_parameters` and `model/training_flops_per_token`; *Parameters, show diff only* lists
  every other difference.
- **Loss against compute:** in a chart of `valid/loss` set the x-axis to `progress/training_flops`, `progress/tokens` or
  `progress/seconds`.
- **One seed is a direction, not a result.**

| group of charts | what it shows |
|---|---|
| `train` | loss of each batch, in nats a token |
| `valid` | loss and bits per byte on the same fixed part of the validation set, while training |
| `test`, `valid_whole` | the finished model on every token of the test and of the validation set |
| `model` | size and cost |
| `speed`, `system` | this machine; they vary between equal runs |
| `optimizer`, `progress` | learning rate, gradient norm; tokens, FLOPs and seconds so far |
"""


def run_name(facts: Mapping[str, Any]) -> str:
    """Such as `stacked · 1.13 M`."""
    return f"{facts['model']} · {count(facts['size']['model/parameters'])}"


def run_note(facts: Mapping[str, Any], evaluation: Mapping[str, Any] | None) -> str:
    """What was trained on what and, once it was evaluated, how good it is and what it writes."""
    size, data, params = facts["size"], facts["data"], facts["params"]
    tokens = params["train.steps"] * params["train.batch_size"] * params["train.context"]
    seen = tokens / data["splits"]["train"]["tokens"]
    text = (
        f"**{facts['model']}**: a {_shape(params)} of {count(size['model/parameters'])} parameters, "
        f"{count(size['model/body_parameters'])} of them in its body; "
        f"{quantity(size['model/training_flops_per_token'], 'FLOP')} of training a token.\n\n"
        f"Trained for {params['train.steps']:,} steps on {count(tokens)} tokens: "
        f"{seen:.2g} passes over the training text of **{data['name']}** "
        f"({quantity(data['splits']['train']['bytes'], 'B')}, vocabulary {data['vocab_size']:,}).\n"
    )
    if evaluation is None:
        return text
    rows = (("bits per byte", "bits_per_byte", 4), ("loss, nats a token", "loss", 4), ("word perplexity", "word_perplexity", 1))
    valid, test, sample = evaluation["valid"], evaluation["test"], evaluation["sample"]
    table = "\n".join(f"| {label} | {valid[key]:,.{digits}f} | {test[key]:,.{digits}f} |" for label, key, digits in rows)
    fence = "`" * 8  # longer than any the text may hold
    return (
        f"{text}\n| lower is better | valid | test |\n|---|---|---|\n{table}\n\n"
        f"After the prompt `{sample['prompt']}` it writes:\n\n{fence}\n{sample['text']}\n{fence}\n"
    )


def _shape(params: Mapping[str, Any]) -> str:
    if params["architecture.kind"] == "dense":
        return f"dense decoder with {params['architecture.layers']} layers"
    stacks = []
    while (place := f"architecture.stacks.{len(stacks)}") + ".layers" in params:
        stacks.append(f"{params[f'{place}.layers']} x {params[f'{place}.features']}")
    return f"stacked-parallel decoder with {len(stacks)} stacks (layers x features: {', '.join(stacks)})"
