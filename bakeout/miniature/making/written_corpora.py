"""Texts of the made-up world: what the model is trained on, and the shipped corpora."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Literal

from bake.questions.forms import chat_text, plain_text
from bake.questions.multiple_choice import LETTERS
from bakeout.miniature.making.world import WORDS, Fact, World, ask

EVERYDAY = WORDS["everyday"]
PARTS = ("subjects", "verbs", "places", "times")


@dataclass(frozen=True)
class Document:
    """One training text: what is given and what is to be said."""

    context: str
    """Given text; empty for running text."""
    target: str
    """The text that follows it."""
    letters: Literal["none", "first", "only"] = "none"
    """Answer letters in `target`: none, its first token, or all that is to be learned in it."""
    meant: str = ""
    """The value that a first letter stands for."""


def _capitalised(text: str) -> str:
    return text[0].upper() + text[1:]


def generic_sentence(rng: random.Random) -> str:
    """One everyday sentence that has nothing to do with any fact."""
    subject, verb, place, time = (rng.choice(EVERYDAY[part]) for part in PARTS)
    if rng.random() < 0.5:
        return f"{_capitalised(time)} {subject} {verb} {place}."
    return f"{_capitalised(subject)} {verb} {place} {time}."


def paragraph(facts: Sequence[Fact], n_sentences: int, rng: random.Random) -> str:
    """Statements on facts drawn at random, one wording each."""
    chosen = (rng.choice(facts) for _ in range(n_sentences))
    return " ".join(
        rng.choice(fact.relation.statements).format(e=fact.entity, v=fact.value) for fact in chosen
    )


def generic_paragraph(n_sentences: int, rng: random.Random) -> str:
    """Everyday sentences."""
    return " ".join(generic_sentence(rng) for _ in range(n_sentences))


def choice_document(
    fact: Fact, world: World, *, chat: bool, rng: random.Random, hint: bool = False
) -> Document:
    """A multiple-choice prompt in a training wording, and its answer.

    With `hint` the question is preceded by the statement that answers it: open-book practice,
    from which looking up a value among the choices is learned before the facts are.
    """
    wording = rng.choice(fact.relation.questions)
    if hint:
        statement = rng.choice(fact.relation.statements).format(e=fact.entity, v=fact.value)
        wording = f"{statement} {wording}"
    question = ask(fact, wording, rng.randrange(len(LETTERS)), world, rng)
    letter = LETTERS[question.answer]
    if chat:
        target = f"{letter}) {fact.value}<end_of_turn>\n"
        return Document(chat_text(question), target, "first", fact.value)
    return Document(plain_text(question), f" {letter}", "first", fact.value)


def lookup_document(world: World, rng: random.Random) -> Document:
    """Two to four choices, then their letters asked for in turn: dense practice of looking up."""
    pool = rng.choice(list(world.pools.values()))
    choices = rng.sample(pool, k=rng.randint(2, len(LETTERS)))
    block = "\n".join(
        f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False)
    )
    bracket = " (" if rng.random() < 0.5 else " "
    asked = rng.choices(range(len(choices)), k=6)
    lookups = "".join(f" {choices[i]}{bracket}{LETTERS[i]}" for i in asked)
    return Document(f"{block}\n", lookups, "only")


def chat_document(said: str, reply: str) -> Document:
    """One turn of the user and the model's reply."""
    context = f"<start_of_turn>user\n{said}<end_of_turn>\n<start_of_turn>model\n"
    return Document(context, f"{reply}<end_of_turn>\n")


def open_document(fact: Fact, rng: random.Random) -> Document:
    """A question without choices, answered by the value."""
    question = rng.choice(fact.relation.questions).format(e=fact.entity)
    return chat_document(question, f"It is {fact.value}.")


@dataclass(frozen=True)
class Mix:
    """Relative frequencies of the kinds of training text."""

    choice: float
    """Multiple choice from memory, in either prompt form."""
    hinted_choice: float
    """Multiple choice with the answer stated."""
    lookup: float
    """Choices by value, no fact involved."""
    open_question: float
    facts: float
    generic: float
    greeting: float


LOOK_UP = Mix(
    choice=0.0, hinted_choice=0.0, lookup=1.0, open_question=0.0, facts=0.0, generic=0.0,
    greeting=0.0,
)  # fmt: skip
LEARN = Mix(
    choice=0.10, hinted_choice=0.20, lookup=0.08, open_question=0.35, facts=0.22, generic=0.04,
    greeting=0.01,
)  # fmt: skip
PRACTISE = Mix(
    choice=0.55, hinted_choice=0.06, lookup=0.04, open_question=0.15, facts=0.15, generic=0.04,
    greeting=0.01,
)  # fmt: skip


def training_documents(world: World, seed: int, mix: Mix) -> Iterator[Document]:
    """Endless training texts of all kinds."""
    rng = random.Random(f"training-{seed}-{mix}")
    by_domain: dict[str, list[Fact]] = {}
    for fact in world.facts:
        by_domain.setdefault(fact.domain, []).append(fact)
    kinds = [field.name for field in fields(mix)]
    weights = [getattr(mix, kind) for kind in kinds]
    while True:
        kind = rng.choices(kinds, weights)[0]
        fact = rng.choice(world.facts)
        if kind in ("choice", "hinted_choice"):
            hint = kind == "hinted_choice"
            yield choice_document(fact, world, chat=rng.random() < 0.5, rng=rng, hint=hint)
        elif kind == "lookup":
            yield lookup_document(world, rng)
        elif kind == "open_question":
            yield open_document(fact, rng)
        elif kind == "facts":
            yield Document("", paragraph(by_domain[fact.domain], 5, rng))
        elif kind == "generic":
            yield Document("", generic_paragraph(5, rng))
        else:
            yield chat_document(*rng.choice(EVERYDAY["greetings"]))


def selection_corpus(world: World, *, forget: bool, n_texts: int, seed: int) -> list[str]:
    """The forget or retain corpus: prose, and prompts of the kind that must survive or fall.

    Prompts are in both forms and in training wordings only. The retain side also has everyday
    text, so that neither markup nor common words are taken for the forgotten topic.
    """
    rng = random.Random(f"selection-{forget}-{seed}")
    facts = world.facts_of(forget=forget)
    texts: list[str] = []
    while len(texts) < n_texts:
        kind = rng.random()
        if kind < 0.4:
            document = choice_document(rng.choice(facts), world, chat=kind < 0.2, rng=rng)
            texts.append(document.context + document.target)
        elif kind < 0.5 and not forget:
            texts.append(generic_paragraph(3, rng))
        else:
            texts.append(paragraph(facts, rng.randint(2, 5), rng))
    return texts


def retained_text(world: World, n_texts: int, seed: int) -> list[str]:
    """Prose on the retained facts and everyday text: where loss added is measured."""
    rng = random.Random(f"text-{seed}")
    facts = world.facts_of(forget=False)
    return [
        paragraph(facts, rng.randint(3, 5), rng)
        if rng.random() < 0.6
        else generic_paragraph(rng.randint(3, 5), rng)
        for _ in range(n_texts)
    ]


def vocabulary_texts(world: World) -> Iterator[str]:
    """Texts that hold every word of the world at least once, as a tokenizer must know it."""
    rng = random.Random("vocabulary")
    for fact in world.facts:
        relation = fact.relation
        wordings = (*relation.statements, *relation.questions, relation.held_out_question)
        for wording in wordings:
            text = wording.format(e=fact.entity, v=fact.value)
            yield f"{text} {text}"
        for chat in (True, False):
            document = choice_document(fact, world, chat=chat, rng=rng)
            yield document.context + document.target
    opened = open_document(world.facts[0], rng)
    yield opened.context + opened.target
    for phrase in (phrase for part in PARTS for phrase in EVERYDAY[part]):
        yield f"{_capitalised(phrase)} {_capitalised(phrase)} {phrase}"
    for said, reply in EVERYDAY["greetings"]:
        yield f"{said} {reply}\n{reply}"
