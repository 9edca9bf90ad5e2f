"""The outermost ring of the package: the table of stages, and running one without losing work."""
