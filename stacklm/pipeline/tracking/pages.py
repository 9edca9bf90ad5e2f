"""What MLflow's pages say and show: the notes on a run, a model and the experiment, and the saved view of charts.

Notes are Markdown. The view is the page that `stacklm ui` opens: its charts answer the questions of a comparison in order.
MLflow keeps saved views as tags of an experiment; its menu *Views* lists them. A version that does not understand ours shows
its own charts instead.
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
    "Does every part learn? (change of one step over the weights)": [
        (f"health/relative_update/{role}", "step") for role in ("embedding", "matrix", "vector", "head")
    ],
}
"""Charts by section: a metric, and what it is drawn over (None: bars).

MLflow titles a chart by the names of its metrics, cut to the width: two charts in a row of 1,500 pixels leave room for these.
"""
EXPERIMENT_NOTE = """\
**Language models that differ in one thing: how their layers are connected.** Every run is one pretraining. \
The saved view *Comparison* (menu *Views*) shows, in this order:

1. **Which model is better?** `bits_per_byte/test`: lower is better, and it does not depend on the tokenizer.
2. **What does the quality cost?** The same against training compute, tokens and time.
3. **Is the comparison fair?** Parameters and FLOPs side by side. For every other difference select the runs, press
   *Compare* and show only what differs.
4. **Did training go well?** Loss, gradient norm, learning rate, speed.

Runs of one model differ in their seed; the report has means, intervals and verdicts. A run's page has \
its settings, its data, a sample of what the model writes, the report and the model.

| metrics | what they are |
|---|---|
| `bits_per_byte/...`, `loss/...` (nats per token), `word_perplexity/...` | how well text is predicted: `train` each batch, \
`valid` a fixed part of the validation set while training, `valid_whole` and `test` every token of the set after training |
| `benchmarks/...` | scores on the benchmarks of `evaluate.benchmarks` |
| `model/...` | size and cost |
| `progress/...` | tokens, FLOPs and seconds so far: x-axes for the charts above |
| `optimizer/...` | learning rate, norm of the gradient |
| `speed/...`, `system/...` | this machine; they vary between equal runs |
"""


def address(server: str, experiment: str) -> str:
    """Where the view is, on the pages of `server`."""
    return f"{server}/#/experiments/{experiment}/runs?workflowType=machine_learning&compareRunsMode=CHART&viewStateShareKey={KEY}"


def tag_value() -> str:
    """The view in the form in which MLflow's pages keep it."""
    state = {
        "orderByKey": COLUMNS[0],  # by time, MLflow would hide the models below the run of the pipeline
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
    """Whether a tag holds this view, whenever it was made."""
    return tag is not None and json.loads(tag).get("state") == json.loads(tag_value())["state"]


def run_name(facts: Mapping[str, Any]) -> str:
    """Such as `stacked-1 · 1.13 M` for seed 1, and behind it the name of the DVC experiment if it is part of one."""
    experiment = ((facts.get("pipeline") or {}).get("tags", {})).get("dvc.experiment")
    return " · ".join(filter(None, [f"{facts['model']}-{facts['seed']}", count(facts["size"]["model/parameters"]), experiment]))


def run_note(facts: Mapping[str, Any], evaluation: Mapping[str, Any] | None) -> str:
    """What was trained on what and, once it was evaluated, how good it is and what it writes."""
    size, data, params = facts["size"], facts["data"], facts["params"]
    tokens = params["train.max_steps"] * params["train.global_batch_size"] * params["train.context_length"]
    seen = tokens / data["splits"]["train"]["tokens"]
    text = (
        f"A {_shape(params)}: {count(size['model/parameters'])} parameters, {count(size['model/body_parameters'])} of them in the "
        f"body; {quantity(size['model/training_flops_per_token'], 'FLOP')} of training per token. "
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
        f"The prompt\n\n{_block(sample['prompt'])}\n\nis continued with\n\n{_block(sample['text'])}\n"
    )


def weights_note(model_id: str) -> str:
    """How to use a model."""
    return (
        "Weights, settings and tokenizer as safetensors and JSON; loading runs nothing from the files. "
        "It needs the package `stacklm` in the version of the run's commit.\n\n```python\n"
        f'model = mlflow.pyfunc.load_model("models:/{model_id}")\n'
        'model.predict(["def "], params={"temperature": 0.0})  # what follows each prompt\n'
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
        # The title is these names joined by "vs". The second is no metric and draws nothing; it tells charts of one metric apart.
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
    """A code block whose fence is longer than any in the text."""
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
        return f"model of its own, {_inline(where)}"
    if params["architecture.kind"] == "huggingface":
        return f"model of transformers, {_inline(params['architecture.config'])}"
    if params["architecture.kind"] == "dense":
        return f"dense decoder, layers one after the other: {params['architecture.n_layers']}"
    stacks = []
    while (place := f"architecture.stacks.{len(stacks)}") + ".layers" in params:
        stacks.append(f"{params[f'{place}.layers']} x {params[f'{place}.features']}")
    return f"stacked-parallel decoder with {len(stacks)} stacks (layers x features: {', '.join(stacks)})"
