"""Evaluation of trained models: scores on whole valid and test sets and on benchmarks, and text generation."""
