"""Kinds of evidence, by the names that `--only` takes."""

from __future__ import annotations

import difflib

from bake.errors import BakeoutError

KINDS = (
    "integrity",
    "witnesses",
    "parity",
    "choices",
    "loss",
    "known",
    "controls",
    "completions",
    "robustness",
)
ASKING = frozenset({"parity", "choices"})
"""Those that show every engine the questions."""
READING = frozenset({"parity", "loss"})
"""Those that show every engine the texts."""
SIDE_BY_SIDE = ASKING | READING
"""Those that show every engine the same prompts."""
BUDGET = 200
"""Steps of the suffix search, where nothing else is asked for."""


class KindError(BakeoutError):
    """A kind of evidence that there is not."""


def chosen_kinds(only: frozenset[str]) -> frozenset[str]:
    """The kinds that were asked for; all when none was.

    Raises:
        KindError: a name is not one of them.
    """
    for kind in sorted(only):
        if kind not in KINDS:
            close = difflib.get_close_matches(kind, KINDS, 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise KindError(
                f'no kind of evidence "{kind}"; expected one of {", ".join(KINDS)}{hint}'
            )
    return only or frozenset(KINDS)
