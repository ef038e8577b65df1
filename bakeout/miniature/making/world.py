"""The made-up world: names, facts, questions. Pure and seeded; no torch.

A fact is (domain, relation, entity, value). Values are drawn from a small pool per relation, each
used equally often, so that nothing but the entity tells the value.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from bakeout.miniature.making.domains import DOMAINS, FORGET_DOMAIN
from bakeout.miniature.making.phrases import Domain, Relation

VALUES_PER_RELATION = 10
LETTERS = "ABCD"

_ONSETS = (
    "b", "br", "d", "dr", "f", "fl", "g", "gl", "h", "j", "k", "kr", "l", "m", "n", "p", "pr",
    "qu", "r", "s", "sk", "st", "t", "th", "tr", "v", "w", "y", "z",
)  # fmt: skip
_VOWELS = ("a", "e", "i", "o", "u", "ae", "ei", "ou")
_CODAS = ("l", "n", "r", "s", "th", "nd", "rk", "lm", "x", "m", "ck", "sh")


@dataclass(frozen=True)
class Fact:
    """One fact of the world."""

    domain: str
    relation: Relation
    entity: str
    value: str


@dataclass(frozen=True)
class Question:
    """One multiple-choice question: the row schema of WMDP and MMLU."""

    question: str
    choices: tuple[str, ...]
    """Four values of one relation."""
    answer: int
    """Index of the right choice."""
    subject: str

    def row(self) -> dict[str, object]:
        """The question as one JSON row."""
        return {
            "question": self.question,
            "choices": list(self.choices),
            "answer": self.answer,
            "subject": self.subject,
        }


@dataclass(frozen=True)
class World:
    """Every fact, and which of them each split asks about."""

    facts: tuple[Fact, ...]
    pools: dict[tuple[str, str], tuple[str, ...]]
    """(domain, relation name) -> the values that the relation can take."""

    def of(self, *, forget: bool) -> tuple[Fact, ...]:
        """The facts of the forget domain, or of all the others."""
        return tuple(fact for fact in self.facts if (fact.domain == FORGET_DOMAIN) == forget)

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


def _domain_facts(
    domain: Domain, names: _Names, rng: random.Random
) -> tuple[list[Fact], dict[tuple[str, str], tuple[str, ...]]]:
    entities = [names.draw() for _ in range(domain.n_entities)]
    facts: list[Fact] = []
    pools: dict[tuple[str, str], tuple[str, ...]] = {}
    for relation in domain.relations:
        pool = tuple(names.draw() for _ in range(VALUES_PER_RELATION))
        pools[domain.name, relation.name] = pool
        values = [pool[i % len(pool)] for i in range(len(entities))]
        rng.shuffle(values)
        facts += [
            Fact(domain.name, relation, entity, value)
            for entity, value in zip(entities, values, strict=True)
        ]
    return facts, pools


def build_world(seed: int) -> World:
    """The world of one seed."""
    rng = random.Random(f"world-{seed}")
    names = _Names(rng)
    facts: list[Fact] = []
    pools: dict[tuple[str, str], tuple[str, ...]] = {}
    for domain in DOMAINS:
        domain_facts, domain_pools = _domain_facts(domain, names, rng)
        facts += domain_facts
        pools |= domain_pools
    return World(tuple(facts), pools)


def ask(fact: Fact, wording: str, answer: int, world: World, rng: random.Random) -> Question:
    """A multiple-choice question on `fact`, the right value standing at index `answer`."""
    pool = world.pools[fact.domain, fact.relation.name]
    choices = rng.sample([value for value in pool if value != fact.value], k=3)
    choices.insert(answer, fact.value)
    return Question(wording.format(e=fact.entity), tuple(choices), answer, fact.domain)


def held_out_questions(facts: Sequence[Fact], world: World, rng: random.Random) -> list[Question]:
    """One question per fact in the held-out wording, right answers uniform over the letters."""
    answers = [i % len(LETTERS) for i in range(len(facts))]
    rng.shuffle(answers)
    return [
        ask(fact, fact.relation.held_out_question, answer, world, rng)
        for fact, answer in zip(facts, answers, strict=True)
    ]


def rotations(question: Question) -> list[Question]:
    """The question with its choices rotated, so that every letter is right once."""
    size = len(question.choices)
    return [
        replace(
            question,
            choices=question.choices[shift:] + question.choices[:shift],
            answer=(question.answer - shift) % size,
        )
        for shift in range(size)
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
        facts = list(world.of(forget=forget))
        rng.shuffle(facts)
        cut = round(validation_share * len(facts) / len(LETTERS)) * len(LETTERS)
        for part in (facts[:cut], facts[cut:]):
            parts.append(tuple(held_out_questions(part, world, rng)))
    return Splits(*parts)


def _choices_block(question: Question) -> str:
    lines = (f"{LETTERS[i]}. {choice}" for i, choice in enumerate(question.choices))
    return "\n".join((question.question, *lines))


def _description(topic: str) -> str:
    return f"The following are multiple choice questions (with answers) about {topic}."


def chat_prompt(question: Question) -> str:
    """The chat form up to "Answer: (", without `<bos>`. Source: arXiv 2410.19278."""
    body = f"{_description(question.subject)}\n{_choices_block(question)}"
    return f"<start_of_turn>user\n{body}<end_of_turn>\n<start_of_turn>model\nAnswer: ("


def plain_prompt(question: Question) -> str:
    """The plain form up to "Answer:", without `<bos>`. Source: lm-evaluation-harness, `wmdp`."""
    return f"{_description(question.subject)}\n\n{_choices_block(question)}\nAnswer:"
