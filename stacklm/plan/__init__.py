"""Estimates of memory, FLOPs and disk before a run.

memory   peak memory: the trainer's own step on tensors without data
plan     all estimates for every model, and the search for settings that fit
text     plans and the variants of a stacked model as text for a terminal
"""
