"""Attacks: take the forgetting out of the weights, with what shows it, blind, or with the base."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from bake.errors import ModelError
from verify.attacks.weights.base_difference import subtract_difference, towards_base
from verify.attacks.weights.inserted_layers import inserted_layers
from verify.audit.attempts import Attempt, Scores, Settings
from verify.audit.subject import without_layers
from verify.audit.target import Target
from verify.audit.work_order import Work

SHARES = (0.25, 0.5, 0.75)
"""Of the way to the base's weights."""
RANKS = (1, 4, 16)
"""Directions of each matrix's difference to the base, beside those that stand out of the noise."""
SPECTRUM = "spectrum"
"""As the rank: those that stand out."""
BLIND = "strip: blind search"
MOST_SHOWN = 8
"""Layers that a note names."""


def strip(work: Work) -> Iterator[Attempt]:
    """What the folder's carrier allows."""
    brief = {"brief": work.level.quick}
    if work.subject.strips:
        yield from work.each(deleted, [brief])[0]
    carrier = work.subject.carrier
    if carrier not in ("layer", "adapter"):  # which hold the base's own layers, and name the clamp
        found = work.each(searched, [brief])[0]
        yield from found or [
            Attempt(BLIND, "deletes decoder layers", work.before, note="no layer looks put in")
        ]
    if carrier in ("layer", "adapter", "compiled"):  # whose weights are the base's
        return
    quick = work.level.quick
    ranks = [SPECTRUM, *([] if quick else RANKS)]
    for found in work.each(subtracted, [{"rank": rank, **brief} for rank in ranks]):
        yield from found
    shares = SHARES[1:2] if quick else SHARES
    for found in work.each(interpolated, [{"share": share, **brief} for share in shares]):
        yield from found


def deleted(target: Target, settings: Settings) -> list[Attempt]:
    """The clamp, by where the folder itself says that it is."""
    does = "takes out the clamp, whose place the folder tells"
    return [
        Attempt(
            "strip: delete", does, target.score(target.subject.stripped(), brief=settings["brief"])
        )
    ]


def searched(target: Target, settings: Settings) -> list[Attempt]:
    """Layers that were put in, found without a word of the folder's."""
    model = target.subject.model()
    layers = inserted_layers(model)
    if not layers:
        return []
    shown = ", ".join(map(str, layers[:MOST_SHOWN])) + (", …" if layers[MOST_SHOWN:] else "")
    does = f"searches the weights for decoder layers that were put in, and deletes {len(layers)}"
    scores = target.score(without_layers(model, layers), brief=settings["brief"])
    return [Attempt(BLIND, does, scores, note=f"found layers {shown}")]


def subtracted(target: Target, settings: Settings) -> list[Attempt]:
    """The largest directions of the difference to the base."""
    model, rank = target.subject.model(), settings["rank"]
    which = "those that stand out" if rank == SPECTRUM else f"the largest {rank}"
    attempt = Attempt(
        "strip: difference",
        f"subtracts the difference to the base, of each matrix {which} of its directions",
        Scores(),
        needs=("base",),
        settings={"rank": rank},
    )
    try:
        n = None if rank == SPECTRUM else rank
        ranks = subtract_difference(model, target.subject.base(), n)
    except ModelError as error:  # a stranger's folder of another make
        return [replace(attempt, note=str(error))]
    if not ranks:
        return []
    found = f"{min(ranks.values())} to {max(ranks.values())} directions of {len(ranks)} matrices"
    return [replace(attempt, scores=target.score(model, brief=settings["brief"]), note=found)]


def interpolated(target: Target, settings: Settings) -> list[Attempt]:
    """Part of the way to the base."""
    share = settings["share"]
    attempt = Attempt(
        "strip: interpolation",
        f"moves the weights {share:.0%} of the way to the base's",
        Scores(),
        needs=("base",),
        settings={"share": share},
    )
    try:
        model = towards_base(target.subject.model(), target.subject.base(), share)
    except ModelError as error:
        return [replace(attempt, note=str(error))]
    return [replace(attempt, scores=target.score(model, brief=settings["brief"]))]
