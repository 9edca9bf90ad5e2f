"""Judging trained models: scores on whole sets of text they have not seen and on benchmarks, and text of their own."""
