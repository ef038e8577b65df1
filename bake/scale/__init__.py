"""Past one process: work on a Ray cluster."""
