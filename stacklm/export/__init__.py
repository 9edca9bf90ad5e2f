"""Trained models for other programs.

hf                 exports a folder that `transformers` loads without stacklm
modeling_stacklm   the model in that folder, as a `transformers` class
source             extracts the code of this package that the model needs
card               the model card: architecture, data, results
"""
