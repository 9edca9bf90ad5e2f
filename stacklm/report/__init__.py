"""The comparison: what the trained models have in common, what sets them apart, and a page that shows it.

runs        what training and evaluation left behind, read and checked for being comparable
comparison  the plain facts, the differences and the finding, deterministic: no times
tables      their rows, as text for people
plots       loss against tokens, FLOPs and time; health while training
page        one report as index.html and as Markdown
compare     the stage that makes it all
"""
