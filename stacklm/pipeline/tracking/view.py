"""The page that `stacklm ui` opens: a saved view of MLflow whose charts answer the questions of a comparison in order.

MLflow keeps saved views as tags of an experiment; its menu *Views* lists them. A version that does not understand ours shows
its own charts instead.
"""

from __future__ import annotations

import base64
import json
import time
import zlib
from typing import Any

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
    "Which model is better? (lower is better)": (("bits_per_byte/test", None), (QUALITY, "step")),
    "What does the quality cost?": (
        (QUALITY, "progress/training_flops"),
        (QUALITY, "progress/tokens"),
        (QUALITY, "progress/seconds"),
    ),
    "Is the comparison fair?": (
        ("model/parameters", None),
        ("model/body_parameters", None),
        ("model/training_flops_per_token", None),
    ),
    "Did training go well?": (
        ("loss/train", "step"),
        ("optimizer/grad_norm", "step"),
        ("optimizer/learning_rate", "step"),
        ("speed/tokens_per_second", "step"),
    ),
    "Does every part learn? (change of one step over the weights)": tuple(
        (f"health/relative_update/{role}", "step") for role in ("embedding", "matrix", "vector", "head")
    ),
}
"""Charts by section: a metric, and what it is drawn over (None: bars of single values)."""


def address(server: str, experiment: str) -> str:
    """Where the view is, on the pages of `server`."""
    return f"{server}/#/experiments/{experiment}/runs?workflowType=machine_learning&compareRunsMode=CHART&viewStateShareKey={KEY}"


def tag_value() -> str:
    """The view in the form in which MLflow's pages keep it."""
    state = {
        "orderByKey": "attributes.start_time",
        "orderByAsc": False,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "searchFilter": "",
        "selectedColumns": list(COLUMNS),
        "columnOrder": [],
        "columnWidths": {},
        "runsHiddenMode": "FIRST_10_RUNS",
        "compareRunSections": [{"uuid": name, "name": name, "display": True, "isReordered": True} for name in SECTIONS],
        "compareRunCharts": [_chart(section, *chart) for section, charts in SECTIONS.items() for chart in charts],
        "viewMaximized": False,
        "runListHidden": False,
        "isAccordionReordered": True,
        "useGroupedValuesInCharts": True,
        "hideEmptyCharts": True,
        "groupBy": None,
        "groupsExpanded": {},
        "globalLineChartConfig": {"xAxisKey": "step", "lineSmoothness": 0, "selectedXAxisMetricKey": ""},
    }
    packed = base64.b64encode(zlib.compress(json.dumps(state).encode())).decode()
    now = round(time.time() * 1000)
    return json.dumps({"name": "Comparison", "createdAt": now, "updatedAt": now, "state": f"deflate;{packed}"})


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
        "xAxisKey": "step" if over == "step" else "metric",
        "selectedXAxisMetricKey": "" if over == "step" else over,
        "yAxisKey": "metric",
        "yAxisExpressions": [],
        "range": {},
        "ignoreOutliers": False,
        "useGlobalXaxisKey": False,
        "useGlobalLineSmoothing": True,
    }
