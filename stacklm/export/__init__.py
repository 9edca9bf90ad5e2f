"""Trained models for other programs.

hf                 a folder that `transformers` loads, also where stacklm is not installed
modeling_stacklm   the model in that folder, as `transformers` knows models
source             the part of this package that goes with it
card               the model card: what a model is, was trained on and reaches
"""
