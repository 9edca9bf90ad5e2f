"""Contents of MLflow's UI: notes on a run, a model and the experiment, and the saved view of charts.

Notes are Markdown. `stacklm ui` opens the saved view, whose charts answer the questions of a comparison in order. MLflow stores
saved views as tags of an experiment; its menu *Views* lists them. A version that cannot read this one shows its default charts
instead.
"""

from __future__ import annotations

import base64
import json
import re
import time
import zlib
from collections.abc import Mapping
from typing import Any

from stacklm.units import count, quantity

KEY = "comparison"
TAG = f"mlflow.sharedViewState.{KEY}"

COLUMNS = (
    "metrics.`bits_per_byte/test`",
    "metrics.`model/parameters`",
    "metrics.`model/body_parameters`",
    "metrics.`speed/tokens_per_second`",
    "attributes.`Models`",
    "attributes.`Dataset`",
)
QUALITY = "bits_per_byte/valid"
SECTIONS = {
    "Which model is better? (bits per byte, lower is better)": [("bits_per_byte/test", None), (QUALITY, "step")],
    "What does the quality cost? (bits per byte, valid)": [
        (QUALITY, "progress/training_flops"),
        (QUALITY, "progress/tokens"),
        (QUALITY, "progress/seconds"),
    ],
    "Is the comparison fair?": [
        ("model/parameters", None),
        ("model/body_parameters", None),
        ("model/training_flops_per_token", None),
    ],
    "Did training go well?": [
        ("loss/train", "step"),
        ("optimizer/grad_norm", "step"),
        ("optimizer/learning_rate", "step"),
        ("speed/tokens_per_second", "step"),
    ],
    "Does every part learn? (relative size of one update)": [
        (f"health/relative_update/{role}", "step") for role in ("embedding", "matrix", "vector", "head")
    ],
}
"""Charts by section: a metric and its x-axis (None: bar chart).

MLflow's chart titles are the metric names, truncated to the width: these names fit with two charts in a row of 1,500 pixels.
"""
EXPERIMENT_NOTE = """\
**Language models that differ in one thing: how their layers are connected.** Every run is one training run. \
The saved view *Comparison* (menu *Views*) shows, in this order:

1. **Which model is better?** `bits_per_byte/test`: lower is better, and it does not depend on the tokenizer.
2. **What does the quality cost?** The same metric against training FLOPs, tokens and time.
3. **Is the comparison fair?** Parameters and FLOPs of all models. For all other differences select the runs, press
   *Compare* and show only what differs.
4. **Did training go well?** Loss, gradient norm, learning rate, speed.

Runs of one model differ in their seed; the report has means, intervals and verdicts. A run's page shows \
its settings, its data, a generated sample, the report and the model.

| metrics | meaning |
|---|---|
| `bits_per_byte/...`, `loss/...` (nats per token), `word_perplexity/...` | how well text is predicted: `train` on each batch, \
`valid` on a fixed part of the valid set during training, `valid_whole` and `test` on the whole sets after training |
| `benchmarks/...` | scores on the benchmarks of `evaluate.benchmarks` |
| `model/...` | parameters, FLOPs, bytes |
| `progress/...` | tokens, FLOPs and seconds so far: x-axes for the charts above |
| `optimizer/...` | learning rate, gradient norm |
| `speed/...`, `system/...` | speed and resource use on this machine; they vary between equal runs |
"""


def address(server: str, experiment: str) -> str:
    """Return the URL of the saved view on `server`."""
    return f"{server}/#/experiments/{experiment}/runs?workflowType=machine_learning&compareRunsMode=CHART&viewStateShareKey={KEY}"


def tag_value() -> str:
    """Return the saved view in the format of MLflow's UI."""
    state = {
        "orderByKey": COLUMNS[0],  # sorted by time, MLflow would hide the models below the pipeline run
        "orderByAsc": True,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "searchFilter": "",
        "selectedColumns": list(COLUMNS),
        "columnOrder": [],
        "columnWidths": {},
        "runsHiddenMode": "FIRST_10_RUNS",
        "compareRunSections": [
            {"uuid": name, "name": name, "display": True, "isReordered": True, "columns": 2} for name in SECTIONS
        ],
        "compareRunCharts": [_chart(section, *chart) for section, charts in SECTIONS.items() for chart in charts],
        "viewMaximized": False,
        "runListHidden": True,
        "isAccordionReordered": True,
        "useGroupedValuesInCharts": True,
        "hideEmptyCharts": True,
        "groupBy": {"aggregateFunction": "average", "groupByKeys": [{"mode": "tag", "groupByData": "model"}]},
        "groupsExpanded": {},
        "globalLineChartConfig": {"xAxisKey": "step", "lineSmoothness": 0, "selectedXAxisMetricKey": ""},
    }
    packed = base64.b64encode(zlib.compress(json.dumps(state).encode())).decode()
    now = round(time.time() * 1000)
    return json.dumps({"name": "Comparison", "createdAt": now, "updatedAt": now, "state": f"deflate;{packed}"})


def is_current(tag: str | None) -> bool:
    """Return whether a tag has this view, whatever its creation time."""
    return tag is not None and json.loads(tag).get("state") == json.loads(tag_value())["state"]


def run_name(facts: Mapping[str, Any]) -> str:
    """Return a name such as `stacked-1 · 1.13 M` (seed 1), followed by the name of the DVC experiment if it is part of one."""
    experiment = ((facts.get("pipeline") or {}).get("tags", {})).get("dvc.experiment")
    return " · ".join(filter(None, [f"{facts['model']}-{facts['seed']}", count(facts["size"]["model/parameters"]), experiment]))


def run_note(facts: Mapping[str, Any], evaluation: Mapping[str, Any] | None) -> str:
    """Return the note on a run: architecture and data, and after evaluation its scores and a generated sample."""
    size, data, params = facts["size"], facts["data"], facts["params"]
    tokens = params["train.max_steps"] * params["train.global_batch_size"] * params["train.context_length"]
    seen = tokens / data["splits"]["train"]["tokens"]
    text = (
        f"A {_shape(params)}: {count(size['model/parameters'])} parameters, {count(size['model/body_parameters'])} of them in the "
        f"body; {quantity(size['model/training_flops_per_token'], 'FLOP')} per training token. "
        f"Trained for {params['train.max_steps']:,} steps on {count(tokens)} tokens, {seen:.2g} passes over the training text of "
        f"{_inline(data['name'])} ({quantity(data['splits']['train']['bytes'], 'B')}, vocabulary {data['vocab_size']:,}).\n"
    )
    if evaluation is None:
        return text
    valid, test, sample = evaluation["valid"], evaluation["test"], evaluation["sample"]
    rows = {"bits per byte": "bits_per_byte", "loss, nats per token": "loss", "word perplexity": "word_perplexity"}
    table = "\n".join(f"| {label} | {valid[key]:.5g} | {test[key]:.5g} |" for label, key in rows.items())
    return (
        f"**{test['bits_per_byte']:.4f} bits per byte on the test set.** {text}\n"
        f"| lower is better | valid | test |\n|---|---|---|\n{table}\n\n"
        f"Prompt:\n\n{_block(sample['prompt'])}\n\nGenerated continuation:\n\n{_block(sample['text'])}\n"
    )


def weights_note(model_id: str) -> str:
    """Return the note on a logged model: how to use it."""
    return (
        "Weights, settings and tokenizer as safetensors and JSON; loading executes no code from the files. "
        "It needs the package `stacklm` at the run's commit.\n\n```python\n"
        f'model = mlflow.pyfunc.load_model("models:/{model_id}")\n'
        'model.predict(["def "], params={"temperature": 0.0})  # a continuation of each prompt\n'
        "model.get_raw_model()(ids)  # int64 [batch, time] -> float32 logits [batch, time, vocabulary]\n```\n"
    )


def _chart(section: str, metric: str, over: str | None) -> dict[str, Any]:
    chart = {
        "uuid": f"{metric} over {over}",
        "metricSectionId": section,
        "metricKey": metric,
        "runsCountToCompare": 10,
        "deleted": False,
        "isGenerated": False,
    }
    if over is None:
        return {**chart, "type": "BAR"}
    return {
        **chart,
        "type": "LINE",
        "lineSmoothness": 0,
        "scaleType": "linear",
        "xAxisScaleType": "linear",
        # The title is these names joined by "vs". The second is not a metric and draws nothing; it makes titles unique.
        "selectedMetricKeys": [metric] if over == "step" else [metric, over.rpartition("/")[2].replace("_", " ")],
        "xAxisKey": "step" if over == "step" else "metric",
        "selectedXAxisMetricKey": "" if over == "step" else over,
        "yAxisKey": "metric",
        "yAxisExpressions": [],
        "range": {},
        "ignoreOutliers": False,
        "useGlobalXaxisKey": False,
        "useGlobalLineSmoothing": True,
    }


def _block(text: str) -> str:
    """A code block with a fence longer than any in the text."""
    fence = "`" * max(3, _longest_backticks(text) + 1)
    return f"{fence}\n{text}\n{fence}"


def _inline(text: str) -> str:
    """The text on one line, as code."""
    fence = "`" * (_longest_backticks(text) + 1)
    return f"{fence} {' '.join(text.split())} {fence}"


def _longest_backticks(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)


def _shape(params: Mapping[str, Any]) -> str:
    if params["architecture.kind"] == "python":
        where = f"{params['architecture.class']} of {params['architecture.path']}"
        return f"model of the user's code, {_inline(where)}"
    if params["architecture.kind"] == "huggingface":
        return f"transformers model, {_inline(params['architecture.config'])}"
    if params["architecture.kind"] == "dense":
        return f"dense decoder, layers in series: {params['architecture.n_layers']}"
    stacks = []
    while (place := f"architecture.stacks.{len(stacks)}") + ".layers" in params:
        stacks.append(f"{params[f'{place}.layers']} x {params[f'{place}.features']}")
    return f"stacked-parallel decoder with {len(stacks)} stacks (layers x features: {', '.join(stacks)})"
