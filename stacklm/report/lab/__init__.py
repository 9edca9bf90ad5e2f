"""The report of an experiment, from its file and its records only.

tables  findings, arms, trials and provenance as text
plots   intervals, loss against every budget, learning rates
page    the report as index.html and as Markdown, with the templates of the comparison
"""
