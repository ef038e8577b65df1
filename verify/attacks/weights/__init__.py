"""Attacks that change the weights, and train nothing."""
