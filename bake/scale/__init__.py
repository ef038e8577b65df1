"""Past one process: work on a Ray cluster, and a study that machines share."""
