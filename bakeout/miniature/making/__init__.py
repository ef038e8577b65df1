"""Builds the miniature's files from a seed."""
