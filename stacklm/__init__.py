"""stacklm: the laboratory for stacked-parallel decoder language models."""

import importlib
import os
from typing import Any

# With this count a waiting thread spins for about 0.05 ms and then sleeps. By default GNU OpenMP spins 300 times as long, which
# made training ten times slower whenever other programs used the cores. It is read when torch is loaded, so it is set here.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

__version__ = "0.1.0"


def load(target: str) -> tuple[Any, Any, Any]:
    """Load a trained model, its tokenizer and its config, by a name such as `dense-2`, an MLflow run, or `models:/NAME@ALIAS`.

    Raises `StoreError` if they do not match their record; see `stacklm.pipeline.models.load`.
    """
    return importlib.import_module("stacklm.pipeline.models").load_parts(target)
