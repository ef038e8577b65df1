"""What an audit tries: attacks that may change the model, each one file.

To add one: an entry here, and a file beside this one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from verify.attacks.asking_otherwise import asking
from verify.attacks.inside.look_inside import inside
from verify.attacks.relearn import relearn
from verify.attacks.weights.coarse_weights import rounding
from verify.attacks.weights.strip import strip
from verify.audit.attempts import Attempt
from verify.audit.work_order import Work


@dataclass(frozen=True)
class Audit:
    """One kind of attack, which may be several sweeps: `NAME: WHICH`."""

    run: Callable[[Work], Iterator[Attempt]]
    does: str
    """What somebody does, for the list of what was tried."""


AUDITS: dict[str, Audit] = {
    "strip": Audit(strip, "take the forgetting out of the weights"),
    "relearn": Audit(relearn, "fine-tune the model on text of other facts, the same, or none"),
    "inside": Audit(inside, "read and change what the model computes on the way"),
    "input": Audit(asking, "ask in other words, with hints, an open book, or searched tokens"),
    "rounding": Audit(rounding, "round the weights, or drop the smallest"),
}
"""By the beginning of their attempts' names, in the order in which they are tried."""
