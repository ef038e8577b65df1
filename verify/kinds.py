"""Kinds of evidence, by the names that `--only` takes."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path

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


@dataclass(frozen=True)
class Options:
    """How a verification is run."""

    device: str = "cpu"
    """Where base, reference and checkpoint run, as torch names it."""
    cache: Path | None = None
    """Folder in which known questions are kept, and what was found until an interruption: the same
    call goes on from there, to the same report. None keeps nothing."""
    budget: int = 200
    """Steps of the suffix search; 0 leaves it out."""
    tasks: tuple[str, ...] = ()
    """Tasks and groups of lm-evaluation-harness; `local` are the recipe's own questions."""
    evals: Path = Path("lm-eval")
    """Folder for that harness's results."""


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
