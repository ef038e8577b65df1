"""What a topic of the made-up world consists of.

Each topic has one kind of thing and several relations. A relation has *statements* (the corpora),
*questions* (training prompts) and one *held-out question*, which occurs only in the validation and
test splits. Every statement names the thing before the value.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Relation:
    """One relation and its wordings; `{e}` is the thing, `{v}` the value."""

    name: str
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    held_out_question: str


@dataclass(frozen=True)
class Domain:
    """One topic of the world."""

    name: str
    """The topic as the questions' `subject` shows it."""
    n_entities: int
    """How many things of this kind exist; each has one value per relation."""
    relations: tuple[Relation, ...]
