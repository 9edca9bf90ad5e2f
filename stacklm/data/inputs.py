"""Stage `inputs`: list the external files that results depend on, those of the source and of benchmarks."""

from __future__ import annotations

from pathlib import Path

from stacklm.config.data import Data
from stacklm.config.evaluate import Evaluate
from stacklm.data.benchmarks import list_benchmarks
from stacklm.data.sources import list_inputs


def list_all_inputs(config: Data, evaluate: Evaluate, inputs: Path, benchmarks: Path) -> None:
    """List the source's files as JSON in `inputs`, and those of benchmarks in `benchmarks`.

    Raises `DataError` for files that cannot be used, including those of benchmarks, so that errors show before training.
    """
    list_inputs(config, inputs)
    list_benchmarks(evaluate.benchmarks, benchmarks)
