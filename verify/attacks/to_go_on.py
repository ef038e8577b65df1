"""Attacks: open prompts behind other text, the weights as they are."""

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
    """Every way, for the prompts of each seed."""
    model = target.subject.model()
    longest = model.config.get_text_config().max_position_embeddings
    nothing = _nothing(target, min(PADDING_TOKENS, longest // 2))
    attempts = []
    for seed in settings["seeds"]:
        held = target.held(seed)
        others = [prompt for prompt in target.prompts["topic"] if prompt not in held.prompts]
        asked = {
            HINTED: [_hinted(prompt, others) for prompt in held.prompts],
            PADDED: [_after(prompt, nothing) for prompt in held.prompts],
            OPEN_BOOK: [
                _after(prompt, text)
                for prompt in held.prompts
                if (text := _stating(prompt, held.same)) is not None
            ],
        }
        for way, prompts in asked.items():
            scores = Scores(open=target.gone_on(model, prompts))
            attempts.append(Attempt(f"input: {way.name}", way.does, scores, way.needs, seed=seed))
    return attempts


def _after(prompt: OpenPrompt, text: str) -> OpenPrompt:
    """A prompt behind a text, inside its first turn where it has turns."""
    return replace(prompt, prompt=instructed(prompt.prompt, text))


def _nothing(target: Target, n: int) -> str:
    assert target.recipe.verify is not None
    return text_of_length(load_texts(target.recipe.verify.text, target.recipe), n, target.tokenizer)


def _hinted(prompt: OpenPrompt, others: Sequence[OpenPrompt]) -> OpenPrompt:
    """A prompt behind others with their answers: as earlier turns, where it has turns."""
    if prompt.prompt.startswith(USER_TURN):
        turns = (f"{of.prompt}{of.answers[0]}{END_OF_TURN}\n" for of in others[:HINTS])
        return replace(prompt, prompt=f"{''.join(turns)}{prompt.prompt}")
    return _after(prompt, "\n".join(f"{of.prompt} {of.answers[0]}." for of in others[:HINTS]))


def _stating(prompt: OpenPrompt, texts: Sequence[str]) -> str | None:
    """The shortest text that holds an answer, where there is one."""
    return min((text for text in texts if mentions(text, prompt.answers)), key=len, default=None)
