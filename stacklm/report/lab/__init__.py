"""The report of an experiment, from its file and its records alone.

tables  what was found and what it rests on, as text for people
plots   intervals, loss against every budget, brackets of learning rates
page    the report as index.html and as Markdown, by the templates of the comparison
"""
