"""The outermost ring of the package: which stages there are, and running one so that nothing is lost."""
