"""stacklm: the laboratory for stacked-parallel decoder language models."""

import importlib
import os
from typing import Any

# A thread that waits for others spins for some 0.05 ms and then sleeps. By default GNU OpenMP spins 300 times as long,
# which made training ten times slower whenever something else used the cores. It is read when torch is loaded, hence here.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

__version__ = "0.1.0"


def load(target: str) -> tuple[Any, Any, Any]:
    """A trained model, its tokenizer and its config: of a name such as `dense-2`, a run of MLflow, or `models:/NAME@ALIAS`.

    Raises `StoreError` where they are not those on record; see `stacklm.pipeline.models.load`.
    """
    return importlib.import_module("stacklm.pipeline.models").load_parts(target)
