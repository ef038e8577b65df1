"""Attack: irrelevant text in front, in the same turn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from bake.questions.forms import Form
from bake.questions.multiple_choice import Question, Text, load_texts
from verify.attacks.exam import Exam, longest_of, unmeasured
from verify.report.measures import Attack

PADDING_TOKENS = 512
"""Most tokens of irrelevant text in front of each question; half of what the model can read is
enough."""


def padding(exam: Exam) -> Iterator[Attack]:
    """Text about nothing in front."""
    assert exam.recipe.verify is not None
    questions, texts = exam.questions, load_texts(exam.recipe.verify.text, exam.recipe)
    before = longest_of(exam.encoded(questions[:1], [exam.written.text(questions[0])]))
    n = min(PADDING_TOKENS, exam.longest // 2)
    while n > 0:
        text = text_of_length(texts, n, exam.tokenizer)
        asked = exam.encoded(questions, [padded(q, text, exam.written) for q in questions])
        beyond = longest_of(asked) - exam.longest
        if beyond <= 0:
            added = longest_of(asked[:1]) - before
            how = f"{added} tokens of the recipe's text stand in front, in the same turn"
            yield exam.answers("padding", questions, asked).attack("padding", how)
            return
        n -= beyond
    yield unmeasured("padding", f"the questions leave no room for more in {exam.longest} tokens")


def text_of_length(texts: Sequence[Text], n: int, tokenizer: Any) -> str:
    """Texts one after another up to `n` tokens, or all there is; nothing of them is special."""
    ids: list[int] = []
    for text in texts:
        if len(ids) >= n:
            break
        ids += tokenizer(f"{text.text}\n", add_special_tokens=False)["input_ids"]
    decoded: str = tokenizer.decode(ids[:n], skip_special_tokens=True)
    return decoded.strip()


def padded(question: Question, padding: str, form: Form) -> str:
    """A question with text in front of it, inside the same turn."""
    return f"{form.turn}{padding}\n\n{form.text(question).removeprefix(form.turn)}"
