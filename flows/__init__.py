"""The Prefect flows, the outermost ring: order, concurrency, and what Prefect shows. DVC decides what must run."""
