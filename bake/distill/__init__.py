"""Forgetting put into a model's own weights: by training, or by editing them once."""
