"""Errors that a user can act on: each says what it met, what it expected, and what to do."""

from __future__ import annotations

from typing import Any

LONGEST_SHOWN = 200
"""Most characters of a wrong value that an error shows."""


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


class RanOutError(FolderError):
    """A model had too little memory or time, which says nothing of its files."""


class TooLargeError(RanOutError):
    """An engine had too little memory for all that it was given at once, and still stands."""


class ReportError(BakeoutError):
    """A report that cannot be read, is of a newer schema, or is of another state of the folder."""


class DataError(BakeoutError):
    """Questions or texts that cannot be read."""


class ExportError(BakeoutError):
    """A clamp that cannot be carried in the form that was asked for."""


class ScaleError(BakeoutError):
    """A Ray cluster that does not answer, or whose workers cannot do what is asked for."""


class CheckError(BakeoutError):
    """What was written and does not say what it was made from."""


def printable(text: str) -> str:
    """A text on one line, with nothing in it that a terminal would obey."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def shown(value: Any) -> str:
    """What came, for an error's one line."""
    return short(repr(value))


def short(text: str) -> str:
    """A text cut to what an error's line has room for."""
    return text if len(text) <= LONGEST_SHOWN else f"{text[: LONGEST_SHOWN - 1]}…"
