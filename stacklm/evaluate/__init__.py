"""Judging trained models: scores on whole sets of text they have not seen, and text of their own."""
