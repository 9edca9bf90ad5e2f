"""The comparison of the trained models, and reports as HTML and Markdown.

runs        reads the results of training and evaluation and checks that they are comparable
comparison  facts, differences and finding as plain data: deterministic, without times
tables      tables of the comparison as text
plots       loss against tokens, FLOPs and time; training health
page        writes a report as index.html and as Markdown
compare     the stage `compare`, which writes all of these
benchmarks  benchmark scores over seeds, and published scores
leak        the report of `stacklm leak`
lab         the reports of experiments
"""
