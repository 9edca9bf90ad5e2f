"""The texts that explain, in MLflow's pages, a run and the experiment. Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stacklm.report.units import count, quantity

EXPERIMENT_NOTE = """\
**Language models that differ in one thing: how their layers are connected.** Every run is one pretraining. \
The saved view *Comparison* (menu *Views*) shows, in this order:

1. **Which model is better?** `bits_per_byte/test`: lower is better, and it does not depend on the tokenizer.
2. **What does the quality cost?** The same against training compute, tokens and time.
3. **Is the comparison fair?** Parameters and FLOPs side by side. For every other difference select the runs, press
   *Compare* and show only what differs.
4. **Did training go well?** Loss, gradient norm, learning rate, speed.

One seed is a direction, not a result. A run's page has its settings, its data, a sample of what the model writes, the report and \
the model.

| metrics | what they are |
|---|---|
| `bits_per_byte/...`, `loss/...` (nats a token), `word_perplexity/...` | how well text is predicted: `train` each batch, \
`valid` a fixed part of the validation set while training, `valid_whole` and `test` every token of the set after training |
| `model/...` | size and cost |
| `progress/...` | tokens, FLOPs and seconds so far: x-axes for the charts above |
| `optimizer/...` | learning rate, norm of the gradient |
| `speed/...`, `system/...` | this machine; they vary between equal runs |
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
        f"A {_shape(params)}: {count(size['model/parameters'])} parameters, {count(size['model/body_parameters'])} of them in the "
        f"body; {quantity(size['model/training_flops_per_token'], 'FLOP')} of training a token. "
        f"Trained for {params['train.steps']:,} steps on {count(tokens)} tokens, {seen:.2g} passes over the training text of "
        f"**{data['name']}** ({quantity(data['splits']['train']['bytes'], 'B')}, vocabulary {data['vocab_size']:,}).\n"
    )
    if evaluation is None:
        return text
    valid, test, sample = evaluation["valid"], evaluation["test"], evaluation["sample"]
    rows = {"bits per byte": "bits_per_byte", "loss, nats a token": "loss", "word perplexity": "word_perplexity"}
    table = "\n".join(f"| {label} | {valid[key]:.5g} | {test[key]:.5g} |" for label, key in rows.items())
    fence = "`" * 8  # longer than any the text may hold
    return (
        f"**{test['bits_per_byte']:.4f} bits per byte on the test set.** {text}\n"
        f"| lower is better | valid | test |\n|---|---|---|\n{table}\n\n"
        f"After the prompt `{sample['prompt']}` it writes:\n\n{fence}\n{sample['text']}\n{fence}\n"
    )


def weights_note(model_id: str) -> str:
    """How to use a model."""
    return (
        "Weights and settings as safetensors and JSON; loading executes nothing from the files.\n\n```python\n"
        f'model = mlflow.pyfunc.load_model("models:/{model_id}")\n'
        "logits = model.predict(ids)  # int64 [batch, time] -> float32 [batch, time, vocabulary]\n```\n"
    )


def _shape(params: Mapping[str, Any]) -> str:
    if params["architecture.kind"] == "dense":
        return f"dense decoder, layers one after the other: {params['architecture.layers']}"
    stacks = []
    while (place := f"architecture.stacks.{len(stacks)}") + ".layers" in params:
        stacks.append(f"{params[f'{place}.layers']} x {params[f'{place}.features']}")
    return f"stacked-parallel decoder with {len(stacks)} stacks (layers x features: {', '.join(stacks)})"
