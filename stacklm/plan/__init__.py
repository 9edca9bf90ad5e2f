"""What a run takes, before it runs.

memory   the peak of memory: the trainer's own step on tensors without data
plan     all figures of every model, and the search for settings that fit
text     plans and the variants of a stacked model, on a terminal
"""
