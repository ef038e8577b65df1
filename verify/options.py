"""How a verification is run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from export.signing import Trust


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
    minutes: float | None = None
    """About how long it may take: of questions, texts and prompts evenly fewer are asked, and the
    report says of how many. None: all."""
    own_recipe: bool = True
    """Whether, where no recipe is given, the folder's own may be followed, which downloads what it
    names."""
    trust: Trust | None = None
    """By whom the folder must be signed; None: it need not be."""
    keep: bool = False
    """Whether what was found stays in the cache when the run is complete: the same call on the same
    files then finds everything there."""
