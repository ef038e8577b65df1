"""The ways to put forgetting into weights: every fact of a method that code depends on, once.

To add one: an entry here, its loss in `objectives.py`, and its carrier in
`export/carriers/carriers.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from bake.distill import objectives
from bake.distill.objectives import Step
from bake.errors import RecipeError


@dataclass(frozen=True)
class Unlearner:
    """One method."""

    what: str
    """For the command line."""
    loss: Callable[[Step], Tensor] | None = None
    """What is minimised; None: weights are edited once."""
    strength: float = 1.0
    """How hard it pushes, where the recipe does not say."""
    strength_is: str = ""
    """What that number means."""
    steps: int = 0
    """Of training, where the recipe does not say."""
    learning_rate: float = 0.0
    """At its highest, where the recipe does not say."""
    teaches: bool = False
    """The clamped model teaches it on forget text, and its student is the recipe's choice; else
    the base is looked at, and weights change where they are."""
    steers: bool = False
    """It looks at one layer's output, and trains what MLPs write in that layer and the two before
    it."""


UNLEARNERS: dict[str, Unlearner] = {
    "merged": Unlearner(
        "the unhooked model learns the clamped model's outputs on forget text, the base's on "
        "retain text",
        objectives.merged,
        strength=1.0,
        strength_is="weight of the residual stream's distance beside the KL of logits",
        steps=600,
        learning_rate=3e-3,
        teaches=True,
    ),
    "rmu": Unlearner(
        "a layer's output is steered to a random direction on forget text, held on retain text "
        "(arXiv 2403.03218)",
        objectives.rmu,
        strength=100.0,
        strength_is="length of that direction, in root mean squares of the layer's output",
        steps=300,
        learning_rate=1e-2,
        steers=True,
    ),
    "gradient-difference": Unlearner(
        "the loss on forget text is driven up, retain text held (arXiv 2203.12817)",
        objectives.gradient_difference,
        strength=0.1,
        strength_is="weight of the forget loss",
        steps=100,
        learning_rate=1e-4,
    ),
    "npo": Unlearner(
        "negative preference optimisation on forget text, retain text held (arXiv 2404.05868)",
        objectives.npo,
        strength=0.1,
        strength_is="beta: how soon a text counts as forgotten",
        steps=200,
        learning_rate=3e-3,
    ),
    "sae-edit": Unlearner(
        "neurons whose output vectors the SAE reads as clamped features get the opposite written "
        "into them (after arXiv 2505.22586)",
        strength=1.0,
        strength_is="how much of the opposite; the feature alone is taken out at 0",
    ),
}
"""By the name that `--method` takes, which is its carrier's too."""


def unlearner_of(name: str) -> Unlearner:
    """A method by its name.

    Raises:
        RecipeError: there is none.
    """
    if name not in UNLEARNERS:
        raise RecipeError(f'--method "{name}": expected one of {", ".join(UNLEARNERS)}')
    return UNLEARNERS[name]
