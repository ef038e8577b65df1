"""Attacks: what a model knows on the way, whatever it says in the end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from bake.questions.forms import FORMS
from bake.questions.multiple_choice import Question
from bake.questions.open_prompts import OpenPrompt
from verify.attacks.inside.ablation import (
    ablate,
    changed_directions,
    clamp_directions,
    topic_directions,
)
from verify.attacks.inside.logit_lens import choices_seen, tokens_seen
from verify.attacks.inside.probe import probe
from verify.attacks.inside.residuals import Residuals, at_ends, everywhere
from verify.attacks.weights.inserted_layers import wordless_channels
from verify.audit.attempts import OPEN, Attempt, Need, Scores, Settings
from verify.audit.held_out import Held
from verify.audit.target import Target
from verify.audit.work_order import Work
from verify.engines.scoring import token_ids
from verify.report.measures import Share

if TYPE_CHECKING:
    from torch import Tensor

DIRECTIONS = (1, 4, 16)
"""How many are ablated."""
TEXTS, LONGEST = 150, 128
"""Texts that directions are found on, and tokens of one."""
FOUND_BY: dict[str, tuple[tuple[Need, ...], str]] = {
    "clamp": ((), "its clamp writes along"),
    "texts": (("other facts", "benign text"), "text on the topic differs in from other text"),
    "base": (("base", "other facts"), "it differs in from the base on text on the topic"),
}
"""Ways of finding directions: what somebody must have, and what the directions are."""


def inside(work: Work) -> Iterator[Attempt]:
    """Ablation, logit lens and probe; the last two where questions lead, which have choices."""
    numbers = DIRECTIONS[:1] if work.level.quick else DIRECTIONS
    asked = [
        {"found by": by, "directions": n, "brief": work.level.quick, "seed": seed}
        for by in FOUND_BY
        for n in numbers
        for seed in work.seeds
    ]
    for found in work.each(ablated, asked):
        yield from found
    if work.lead == OPEN:
        return
    for found in work.each(read_off, [{"seeds": list(work.seeds)}]):
        yield from found


# --------------------------------------------------------------------------- ablation


def ablated(target: Target, settings: Settings) -> list[Attempt]:
    """Without some directions, at every layer; asked for facts that no text states on which the
    directions were found.
    """
    model, by, n = target.subject.model(), settings["found by"], settings["directions"]
    held = target.held(settings["seed"])
    directions = _directions(target, model, by, n, held)
    if not directions:
        return []
    needs, what = FOUND_BY[by]
    each = "1 direction" if n == 1 else f"{n} directions"
    return [
        Attempt(
            f"inside: ablation by {by}",
            f"takes the {each} out of the residual stream, at every layer, that {what}",
            target.score(ablate(model, directions), held, brief=settings["brief"]),
            needs=needs,
            settings={"directions": n},
            seed=settings["seed"],
        )
    ]


def _directions(target: Target, model: Any, by: str, n: int, held: Held) -> list[Tensor]:
    """As `ablate` takes them; none where there are none."""
    if by == "clamp":
        found = clamp_directions(model)
        return [] if found is None else [found[:n]]
    # Channels without words are what a compiled clamp lives by, and are cut out otherwise.
    words = (~wordless_channels(model.get_input_embeddings().weight)).float().cpu()
    topic = _behind_layers(_on(target, model, held.other)) * words
    if by == "texts":
        other = _behind_layers(_on(target, model, held.benign)) * words
        each = [topic_directions(t, o, n) for t, o in zip(topic, other, strict=True)]
    else:
        base = _behind_layers(_on(target, target.subject.base(), held.other))
        if base.shape != topic.shape:
            return []
        each = [changed_directions(t, b, n) for t, b in zip(topic, base, strict=True)]
    nothing = each[0][:0]  # at the input of the first layer
    return [nothing, *each] if any(len(of) for of in each) else []


def _on(target: Target, model: Any, texts: Sequence[str]) -> Residuals:
    ids = token_ids(list(texts[:TEXTS]), target.tokenizer)
    return everywhere(model, [row[:LONGEST] for row in ids if len(row) > 1], _pad(target))


def _behind_layers(found: Residuals) -> Tensor:
    """[layers, n, d]."""
    at = [n for n, place in enumerate(found.places) if "," not in place]
    return found.h[at]


def _pad(target: Target) -> int:
    return target.tokenizer.pad_token_id or 0


# --------------------------------------------------------------------------- lens and probe


def read_off(target: Target, settings: Settings) -> list[Attempt]:
    """Logit lens and linear probe. Where to read, and the probe, are found on other facts than the
    held-out ones that are asked for.
    """
    import torch

    model, form = target.subject.model(), FORMS[target.form]
    held = {seed: target.held(seed) for seed in settings["seeds"]}
    questions = list(dict.fromkeys(question for of in held.values() for question in of.questions))
    found = _at_ends(target, model, [form.text(question) for question in questions])
    right = torch.tensor([question.answer for question in questions])
    choices = [_beginnings(target, question) for question in questions]
    correct = choices_seen(model, found.h, choices) == right  # [places, n]
    prompts = target.prompts.get("topic", [])
    gone_on = _gone_on(target, model, prompts) if prompts else None  # [places, prompts]
    attempts = []
    for seed, of in held.items():
        asked = torch.tensor([question in of.questions for question in questions])
        place = _best(correct, asked)
        opened = None
        if gone_on is not None and of.prompts:
            begun = torch.tensor([prompt in of.prompts for prompt in prompts])
            opened = _share(gone_on[_best(gone_on, begun), begun])
        lens = Attempt(
            "inside: logit lens",
            "reads the answer off an earlier layer through the model's own head",
            Scores({target.form: _share(correct[place, asked])}, open=opened),
            needs=("other facts",),
            seed=seed,
            note=f"read at {found.places[place]}",
        )
        attempts.append(lens)
        if form.letters:
            probed = probe(found.h[:, ~asked], right[~asked], found.h[:, asked])
            attempts.append(
                Attempt(
                    "inside: linear probe",
                    "trains a linear probe on the residual stream with other facts' questions",
                    Scores({target.form: _share(probed.chosen == right[asked])}),
                    needs=("other facts",),
                    seed=seed,
                    note=f"read at {found.places[probed.place]}",
                )
            )
    return attempts


def _at_ends(target: Target, model: Any, texts: Sequence[str]) -> Residuals:
    return at_ends(model, token_ids(texts, target.tokenizer), _pad(target))


def _beginnings(target: Target, question: Question) -> Sequence[Sequence[int]]:
    """Of each choice, the tokens that may come first in an answer."""
    form = FORMS[target.form]
    if form.letters:
        letters: Sequence[Sequence[int]] = getattr(target.letters, target.form)
        return letters
    return [_first_token(target, f"{form.opens}{choice}") for choice in question.choices]


def _gone_on(target: Target, model: Any, prompts: Sequence[OpenPrompt]) -> Tensor:
    """Whether the first token of an answer comes first: [places, prompts] bool."""
    import torch

    bos = target.tokenizer.bos_token or ""
    found = _at_ends(target, model, [prompt.prompt.removeprefix(bos) for prompt in prompts])
    seen = tokens_seen(model, found.h)
    firsts = [[_first_token(target, f" {answer}") for answer in p.answers] for p in prompts]
    each = [torch.isin(seen[:, n], torch.tensor(of)) for n, of in enumerate(firsts)]
    return torch.stack(each, dim=1)


def _first_token(target: Target, text: str) -> list[int]:
    return list(target.tokenizer(text, add_special_tokens=False)["input_ids"][:1])


def _best(correct: Tensor, asked: Tensor) -> int:
    """The place where most of what is not asked is right.

    Args:
        correct: [places, n] bool.
        asked: [n] bool.
    """
    return int(correct[:, ~asked].sum(dim=1).argmax())


def _share(right: Tensor) -> Share:
    return Share(int(right.sum()), len(right))
