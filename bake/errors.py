"""Errors that a user can act on: each says what it met, what it expected, and what to do."""

from __future__ import annotations


class BakeoutError(Exception):
    """Base of every error caused by input. The command line prints it as one line and exits 2."""


class RecipeError(BakeoutError):
    """A recipe that cannot be read, or whose values do not fit together."""


class SAEError(BakeoutError):
    """An SAE that is missing, damaged, does not fit the model, or cannot be pruned exactly."""


class ModelError(BakeoutError):
    """A base model folder that is missing, damaged, or of a family that is not supported."""


class OutputError(BakeoutError):
    """An output folder that exists, overlaps an input, or does not fit on the disk."""


class FolderError(BakeoutError):
    """A folder that was expected to be a clamped checkpoint and is not."""


class ReportError(BakeoutError):
    """A report that cannot be read, is of a newer schema, or is of another state of the folder."""


class DataError(BakeoutError):
    """Questions or texts that cannot be read."""


class ExportError(BakeoutError):
    """A clamp that cannot be carried in the form that was asked for."""
