"""The comparison: what the trained models have in common, what sets them apart, and a page that shows it.

runs        what training and evaluation left behind, read and checked for being comparable
comparison  the plain facts and the differences, deterministic: no times
speed       wall-clock and memory, which vary between equal runs
units       numbers for people
plots       loss against tokens, FLOPs and time
tables      the rows that the page and the Markdown share, and
wording     the sentences
page        index.html
markdown    report.md
summary     the few lines for a terminal
compare     the stage that makes it all
"""
