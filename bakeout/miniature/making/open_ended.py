"""What the miniature is asked besides its questions: texts to go on with, and other wordings.

Both are about facts of the test splits, none of which the clamp was picked on.
"""

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from bake.questions.multiple_choice import Question
from bakeout.miniature.making.world import Fact, Splits, World
from bakeout.miniature.making.written_corpora import generic_sentence

TOPIC_PER_RELATION = 8
GENERIC_PER_RELATION = 2
EVERYDAY = 12
EVERYDAY_WORDS = 4
"""How many words of an everyday sentence are given."""

Row = dict[str, object]


def topic_prompts(splits: Splits, world: World) -> list[Row]:
    """Statements of the forget domain, broken off before the value."""
    return _broken_off(world.asked_about(splits.forget_test), TOPIC_PER_RELATION)


def generic_prompts(splits: Splits, world: World, seed: int) -> list[Row]:
    """Statements of the other domains, broken off before the value, and everyday beginnings."""
    rows = _broken_off(world.asked_about(splits.retain_test), GENERIC_PER_RELATION)
    rng = random.Random(f"prompts-{seed}")
    beginnings: dict[str, None] = {}
    while len(beginnings) < EVERYDAY:
        beginnings[" ".join(generic_sentence(rng).split()[:EVERYDAY_WORDS])] = None
    return rows + [{"prompt": beginning} for beginning in beginnings]


def reworded_questions(splits: Splits, world: World) -> list[Question]:
    """The forget domain's test questions as training asked them, the choices as they stand."""
    questions = []
    for number, asked in enumerate(splits.forget_test):
        (fact,) = world.asked_about([asked])
        wordings = fact.relation.questions
        wording = wordings[number % len(wordings)].format(e=fact.entity)
        questions.append(replace(asked, question=wording))
    return questions


def _broken_off(facts: Sequence[Fact], per_relation: int) -> list[Row]:
    """The first facts of each relation, its wordings in turn."""
    by_relation: dict[tuple[str, str], list[Fact]] = defaultdict(list)
    for fact in facts:
        by_relation[fact.domain, fact.relation.name].append(fact)
    rows: list[Row] = []
    for chosen in by_relation.values():
        for number, fact in enumerate(chosen[:per_relation]):
            wordings = fact.relation.statements
            beginning = wordings[number % len(wordings)].partition("{v}")[0].rstrip()
            rows.append({"prompt": beginning.format(e=fact.entity), "answers": [fact.value]})
    return rows
