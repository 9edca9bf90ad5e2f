"""Prefect flows, the outermost layer: order, concurrency and what Prefect shows. DVC decides what must run."""
