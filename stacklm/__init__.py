"""stacklm: the laboratory for stacked-parallel decoder language models."""

__version__ = "0.1.0"
