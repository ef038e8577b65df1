"""The forms in which a question is put to a model.

To add one: its name in `bake.recipe.PromptForm`, and an entry in `FORMS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bake.questions.multiple_choice import LETTERS, Question
from bake.recipe import PromptForm

USER_TURN = "<start_of_turn>user\n"
"""What a chat begins with."""


@dataclass(frozen=True)
class Form:
    """How a question is written, and what counts as its answer."""

    text: Callable[[Question], str]
    """The question up to its answer, without BOS."""
    letters: bool
    """Whether the choices are listed and one of A to D is the answer; else each choice's own text
    is, and the order of the choices has no meaning."""
    always: bool
    """Whether it is measured whichever form leads the report; else only where it leads."""
    source: str
    """Whose form it is."""
    tail: str
    """Where what follows a suffix begins: the end of the user's turn, or what asks for the
    answer."""
    turn: str = ""
    """What it begins with that stays in front of text put into the same turn."""
    opens: str = " "
    """Between the question and its answer."""
    closes: str = "\n\n"
    """After the answer, where another question follows."""

    def solved(self, question: Question) -> str:
        """A question with its right answer, ready for another one to follow."""
        right = LETTERS[question.answer] if self.letters else question.choices[question.answer]
        return f"{self.text(question)}{self.opens}{right}{self.closes}"


def chat_text(question: Question) -> str:
    """A question in chat form, without BOS. The answer is the next token.

    Source: Farrell et al., arXiv 2410.19278.
    """
    return chat_form(question.question, question.choices, question.topic)


def chat_form(question: str, choices: Sequence[str], topic: str | None) -> str:
    """A question with any number of choices as `chat_text` has it with four."""
    return (
        f"{USER_TURN}{_description(topic)}\n{question}\n"
        f"{_choices(choices)}<end_of_turn>\n<start_of_turn>model\nAnswer: ("
    )


def plain_text(question: Question) -> str:
    """A question in plain form, without BOS. The answer is the next token, a space in front.

    Source: lm-evaluation-harness, tasks `wmdp_bio` and `mmlu`.
    """
    asked = f"{question.question.strip()}\n{_choices(question.choices)}"
    return f"{_description(question.topic)}\n\n{asked}\nAnswer:"


def cloze_text(question: Question) -> str:
    """A question in cloze form, without BOS. The answer is a choice's own text, a space in front.

    Source: lm-evaluation-harness, tasks `mmlu_continuation`.
    """
    asked = f"Question: {question.question.strip()}"
    return f"{_description(question.topic, 'questions')}\n\n{asked}\nAnswer:"


def _description(topic: str | None, what: str = "multiple choice questions") -> str:
    about = f" about {topic}" if topic else ""
    return f"The following are {what} (with answers){about}."


def _choices(choices: Sequence[str]) -> str:
    return "\n".join(
        f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False)
    )


FORMS: dict[PromptForm, Form] = {
    "chat": Form(
        chat_text,
        letters=True,
        always=True,
        source="Farrell et al.",
        tail="<end_of_turn>",
        turn=USER_TURN,
        opens="",
        closes=")<end_of_turn>\n",
    ),
    "plain": Form(
        plain_text,
        letters=True,
        always=True,
        source="lm-evaluation-harness",
        tail="\nAnswer:",
    ),
    "cloze": Form(
        cloze_text,
        letters=False,
        always=False,
        source="lm-evaluation-harness's continuation tasks",
        tail="\nAnswer:",
    ),
}
"""By the name that a recipe's `[verify] prompt` gives them, in the order they are shown in."""


def forms_beside(leads: PromptForm | None) -> tuple[PromptForm, ...]:
    """The forms that are measured where one of them leads."""
    return tuple(name for name, form in FORMS.items() if form.always or name == leads)


def known_in(leads: PromptForm) -> PromptForm:
    """The form in which it is asked what a model knows: chat, unless what leads asks for no
    letter.
    """
    return "chat" if FORMS[leads].letters else leads
