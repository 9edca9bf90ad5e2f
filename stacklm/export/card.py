"""The model card: what a model is, was trained on and reaches, its limits, and how to repeat it. Markdown, as hubs read it."""

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
"""Of the text, by the kind of the source."""


def model_card(
    facts: Mapping[str, Any],
    settings: Mapping[str, Any],
    weights: str,
    evaluation: Mapping[str, Any] | None,
    comparison: Mapping[str, Any] | None,
    licence: str | None = None,
) -> str:
    """The card of one trained model, the same wherever it is shown.

    `facts` are those of its training, `settings` a params.yaml that repeats it, `weights` their SHA-256; `evaluation` and
    `comparison` the published ones, if they are of this model. `licence` is the owner's, as an identifier of SPDX.
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
            text_licence=LICENCES.get(source["kind"], "The licence of the text is not on record here: ask its source."),
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
    """How many tokens a training reads, by its settings as MLflow has them: numbers, or the text of them."""
    steps, stop = int(params["train.max_steps"]), str(params.get("train.hard_stop"))
    steps = steps if stop == "None" else min(steps, int(stop))
    return steps * int(params["train.global_batch_size"]) * int(params["train.context_length"])


def _over_seeds(model: str, comparison: Mapping[str, Any] | None) -> dict[str, Any]:
    """What the comparison found of this model."""
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
