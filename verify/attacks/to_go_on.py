"""Attacks: open prompts behind other text, the weights as they are.

Nothing in front of a prompt says its answer, but an open book; and nothing is longer than the
padding that questions get.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from bake.families import END_OF_TURN
from bake.questions.forms import USER_TURN
from bake.questions.multiple_choice import load_texts
from bake.questions.open_prompts import OpenPrompt, instructed, mentions
from verify.attacks.hints import HINTS
from verify.attacks.padding import PADDING_TOKENS, text_of_length
from verify.audit.attempts import Attempt, Need, Scores, Settings
from verify.audit.target import Target


@dataclass(frozen=True)
class InFront:
    """What is put in front of prompts."""

    name: str
    does: str
    needs: tuple[Need, ...] = ()


HINTED = InFront("hints", "puts prompts on other facts in front, answered", ("other facts",))
PADDED = InFront("padding", "puts text about nothing in front")
OPEN_BOOK = InFront(
    "open book", "puts a text that states the fact in front of the prompt", ("same facts",)
)


def to_go_on(target: Target, settings: Settings) -> list[Attempt]:
    """Every way, for the prompts of each seed; a prompt is left out where nothing can be put in
    front of it.
    """
    model, bos = target.subject.model(), target.tokenizer.bos_token or ""
    longest = model.config.get_text_config().max_position_embeddings // 2
    most = min(PADDING_TOKENS, longest)
    assert target.recipe.verify is not None
    texts = load_texts(target.recipe.verify.text, target.recipe)
    nothing = text_of_length(texts, most, target.tokenizer)

    def fits(text: str) -> bool:
        ids: list[int] = target.tokenizer(text, add_special_tokens=False)["input_ids"]
        return bool(len(ids) <= most)

    attempts = []
    for seed in settings["seeds"]:
        held = target.held(seed)
        others = [prompt for prompt in target.prompts["topic"] if prompt not in held.prompts]
        asked: dict[InFront, list[OpenPrompt]] = {HINTED: [], PADDED: [], OPEN_BOOK: []}
        for prompt in (replace(of, prompt=of.prompt.removeprefix(bos)) for of in held.prompts):
            if hints := [_hint(of, bos) for of in others if not _tells(of, prompt)][:HINTS]:
                asked[HINTED].append(_behind_hints(prompt, hints))
            if nothing and not mentions(nothing, prompt.answers):
                asked[PADDED].append(_behind(prompt, nothing))
            books = [text for text in target.facts.stating(prompt.row, held.same) if fits(text)]
            if books:
                asked[OPEN_BOOK].append(_behind(prompt, min(books, key=len)))
        for way, prompts in asked.items():
            scores = Scores(open=target.gone_on(model, prompts))
            attempts.append(Attempt(f"input: {way.name}", way.does, scores, way.needs, seed=seed))
    return attempts


def _behind(prompt: OpenPrompt, text: str) -> OpenPrompt:
    """A prompt behind a text, inside its first turn where it has turns."""
    return replace(prompt, prompt=instructed(prompt.prompt, text))


def _hint(prompt: OpenPrompt, bos: str) -> str:
    """A prompt with its answer: turns, or a line."""
    text = prompt.prompt.removeprefix(bos)
    if text.startswith(USER_TURN):
        return f"{text}{prompt.answers[0]}{END_OF_TURN}\n"
    return f"{text} {prompt.answers[0]}."


def _tells(other: OpenPrompt, prompt: OpenPrompt) -> bool:
    return mentions(f"{other.prompt} {other.answers[0]}", prompt.answers)


def _behind_hints(prompt: OpenPrompt, hints: Sequence[str]) -> OpenPrompt:
    """A prompt behind others with their answers: as earlier turns, where it has turns."""
    if prompt.prompt.startswith(USER_TURN):
        return replace(prompt, prompt=f"{''.join(hints)}{prompt.prompt}")
    return _behind(prompt, "\n".join(hints))
