"""What an audit tries: attacks that may change the model, each one file.

To add one: an entry here, and a file beside this one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from verify.attacks.relearn import relearn
from verify.audit.attempts import Attempt
from verify.audit.work_order import Work


@dataclass(frozen=True)
class Audit:
    """One kind of attack, which may be several sweeps: `NAME: WHICH`."""

    run: Callable[[Work], Iterator[Attempt]]
    does: str
    """What somebody does, for the list of what was tried."""


AUDITS: dict[str, Audit] = {
    "relearn": Audit(relearn, "fine-tune the model on text of other facts, the same, or none"),
}
"""By the beginning of their attempts' names, in the order in which they are tried."""
