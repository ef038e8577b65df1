"""The made-up world of `world.toml`: names, facts, questions. Pure and seeded; no torch.

A fact is (domain, relation, entity, value). Values are drawn from a small pool per relation, each
used equally often, so that nothing but the entity tells the value.
"""

import random
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bake.questions.multiple_choice import LETTERS, Question

WORDS = tomllib.loads(Path(__file__).with_name("world.toml").read_text(encoding="utf-8"))
"""Topics and wordings, as the file has them."""
VALUES_PER_RELATION = 10

_ONSETS = (
    "b", "br", "d", "dr", "f", "fl", "g", "gl", "h", "j", "k", "kr", "l", "m", "n", "p", "pr",
    "qu", "r", "s", "sk", "st", "t", "th", "tr", "v", "w", "y", "z",
)  # fmt: skip
_VOWELS = ("a", "e", "i", "o", "u", "ae", "ei", "ou")
_CODAS = ("l", "n", "r", "s", "th", "nd", "rk", "lm", "x", "m", "ck", "sh")


@dataclass(frozen=True)
class Relation:
    """One relation and its wordings; `{e}` is the thing, `{v}` the value."""

    name: str
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    held_out_question: str


@dataclass(frozen=True)
class Fact:
    """One fact of the world."""

    domain: str
    relation: Relation
    entity: str
    value: str


@dataclass(frozen=True)
class World:
    """Every fact, and which of them each split asks about."""

    facts: tuple[Fact, ...]
    pools: dict[tuple[str, str], tuple[str, ...]]
    """(domain, relation name) -> the values that the relation can take."""

    def facts_of(self, *, forget: bool) -> tuple[Fact, ...]:
        """The facts of the forget domain, or of all the others."""
        return tuple(fact for fact in self.facts if (fact.domain == WORDS["forget"]) == forget)

    def asked_about(self, questions: Sequence[Question]) -> list[Fact]:
        """The facts that questions in the held-out wording ask about, one for each."""
        by_question = {f.relation.held_out_question.format(e=f.entity): f for f in self.facts}
        return [by_question[question.question] for question in questions]


class _Names:
    """Draws invented names, each once; no name is the beginning of another."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._taken: set[str] = set()

    def draw(self) -> str:
        while True:
            name = "".join(
                self._rng.choice(part) for part in (_ONSETS, _VOWELS, _ONSETS, _VOWELS, _CODAS)
            ).capitalize()
            if name not in self._taken and len(name) <= 9:
                self._taken.add(name)
                return name


def build_world(seed: int) -> World:
    """The world of one seed."""
    rng = random.Random(f"world-{seed}")
    names = _Names(rng)
    facts: list[Fact] = []
    pools: dict[tuple[str, str], tuple[str, ...]] = {}
    for domain in WORDS["domain"]:
        entities = [names.draw() for _ in range(domain["n_entities"])]
        for table in domain["relation"]:
            relation = Relation(**table)
            pool = tuple(names.draw() for _ in range(VALUES_PER_RELATION))
            pools[domain["name"], relation.name] = pool
            values = [pool[i % len(pool)] for i in range(len(entities))]
            rng.shuffle(values)
            facts += [
                Fact(domain["name"], relation, entity, value)
                for entity, value in zip(entities, values, strict=True)
            ]
    return World(tuple(facts), pools)


def ask(fact: Fact, wording: str, answer: int, world: World, rng: random.Random) -> Question:
    """A multiple-choice question on `fact`, the right value standing at index `answer`."""
    pool = world.pools[fact.domain, fact.relation.name]
    choices = rng.sample([value for value in pool if value != fact.value], k=3)
    choices.insert(answer, fact.value)
    a, b, c, d = choices
    return Question(wording.format(e=fact.entity), (a, b, c, d), answer, fact.domain, row=0)


def held_out_questions(facts: Sequence[Fact], world: World, rng: random.Random) -> list[Question]:
    """One question per fact in the held-out wording, right answers uniform over the letters."""
    answers = [i % len(LETTERS) for i in range(len(facts))]
    rng.shuffle(answers)
    return [
        ask(fact, fact.relation.held_out_question, answer, world, rng)
        for fact, answer in zip(facts, answers, strict=True)
    ]


@dataclass(frozen=True)
class Splits:
    """Questions by split; the two splits of a side share no fact."""

    forget_validation: tuple[Question, ...]
    forget_test: tuple[Question, ...]
    retain_validation: tuple[Question, ...]
    retain_test: tuple[Question, ...]


def question_splits(world: World, seed: int, validation_share: float = 0.4) -> Splits:
    """Shuffles the facts of each side and asks about each of them once."""
    rng = random.Random(f"questions-{seed}")
    parts: list[tuple[Question, ...]] = []
    for forget in (True, False):
        facts = list(world.facts_of(forget=forget))
        rng.shuffle(facts)
        cut = round(validation_share * len(facts) / len(LETTERS)) * len(LETTERS)
        for part in (facts[:cut], facts[cut:]):
            parts.append(tuple(held_out_questions(part, world, rng)))
    return Splits(*parts)
