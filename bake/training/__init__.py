"""Training of an SAE where a model has no public one."""
