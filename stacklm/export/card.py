"""The model card: architecture, data, results, limits, and how to reproduce the model. Markdown in the format of model hubs."""

from __future__ import annotations

from collections.abc import Mapping
from io import StringIO
from statistics import fmean
from typing import Any

from stacklm.config.model import Model
from stacklm.config.schema import read
from stacklm.report.page import templates
from stacklm.report.tables import describe

ROWS = {"bits per byte": "bits_per_byte", "loss, nats per token": "loss", "perplexity per word": "word_perplexity"}
LICENCES = {"stdlib": "The text is under the Python Software Foundation License 2."}
"""Licence of the text, by kind of source."""


def model_card(
    facts: Mapping[str, Any],
    settings: Mapping[str, Any],
    weights: str,
    evaluation: Mapping[str, Any] | None,
    comparison: Mapping[str, Any] | None,
    licence: str | None = None,
) -> str:
    """Return the card of one trained model, the same wherever it is shown.

    `facts` is the metadata of its training run, `settings` a params.yaml that reproduces it, `weights` their SHA-256;
    `evaluation` and `comparison` are the published ones, if they include this model. `licence` is the owner's SPDX identifier.
    """
    data, params, git = facts["data"], facts["params"], facts.get("git", {})
    tokens = training_tokens(params)
    source = data["source"]
    texts = {
        "stdlib": "Source text of Python's standard library",
        "files": f"Files: {', '.join(source.get('paths', ()))}",
        "huggingface": f"[{source.get('name')}](https://huggingface.co/datasets/{source.get('name')}) at {source.get('revision')}",
    }
    return (
        templates("stacklm.export")
        .get_template("card.md")
        .render(
            **{key: facts[key] for key in ("data", "params", "size")},
            **data["splits"],
            run=f"{facts['model']}-{facts['seed']}",
            kind=params["architecture.kind"],
            shape=describe(read(Model, settings["models"][facts["model"]]).architecture),
            source=texts.get(source["kind"], source["kind"]),
            text_licence=LICENCES.get(source["kind"], "The licence of the text is not recorded here: check its source."),
            licence=licence,
            front=licence.lower() if licence else "unknown",
            passes=f"{tokens / data['splits']['train']['tokens']:.2g}",
            tokens=tokens,
            rows=ROWS,
            evaluation=evaluation,
            **_over_seeds(facts["model"], comparison),
            commit=git.get("commit"),
            dirty=git.get("dirty"),
            settings=_yaml(settings),
            versions=", ".join(f"{name} {version}" for name, version in facts["versions"].items()),
            digests={
                "weights": weights,
                "tokenizer": data["tokenizer"],
                "data (manifest of the tokens)": data["sha256"],
                "code": facts["code"],
                "training": facts["fingerprint"],
            },
        )
        .rstrip()
        + "\n"
    )


def training_tokens(params: Mapping[str, Any]) -> int:
    """Return the number of training tokens from flat settings, whose values may be strings, as in MLflow."""
    steps, stop = int(params["train.max_steps"]), str(params.get("train.hard_stop"))
    steps = steps if stop == "None" else min(steps, int(stop))
    return steps * int(params["train.global_batch_size"]) * int(params["train.context_length"])


def _over_seeds(model: str, comparison: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return this model's results over seeds from the comparison."""
    if not comparison or model not in comparison["models"]:
        return {"interval": None, "finding": ""}
    from stacklm.lab.statistics import interval

    scores = [one["test"] for one in comparison["models"][model]["seeds"].values()]
    alpha = comparison["provenance"]["alpha"]
    return {
        "finding": comparison["finding"],
        "seeds": len(scores),
        "mean": fmean(scores),
        "level": 1 - 2 * alpha,
        "interval": interval(scores, alpha) if len(scores) > 1 else None,
    }


def _yaml(value: Mapping[str, Any]) -> str:
    from ruamel.yaml import YAML

    yaml, text = YAML(typ="safe", pure=True), StringIO()
    yaml.default_flow_style, yaml.sort_base_mapping_type_on_output = False, False  # pyright: ignore[reportAttributeAccessIssue]
    yaml.dump(value, text)
    return text.getvalue()
