"""Engines over the same prompts, side by side."""
