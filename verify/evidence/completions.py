"""Completions: what a model says, beside what it was to forget.

Greedy continuations of a few tokens by four variants: the base, the bare reconstruction (what the
SAE alone costs), the unlearned model, and the base with an instruction in front. Beside them the
tokens whose probability moved most, and questions with two choices.

Source: the blog report *Sparse Autoencoders for Improving Unlearning in Large Language Models*.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from bake.questions.answers import LetterTokens, best_letters
from bake.questions.multiple_choice import Question
from bake.questions.open_prompts import (
    OpenPrompt,
    default_instruction,
    instructed,
    load_prompts,
    mentions,
    topic_of,
)
from bake.questions.prompts import Batch
from bake.questions.trivia import TwoChoice, load_trivia, made_of, right_letters, trivia_text
from bake.recipe import Recipe
from verify.engines.continuing import go_on, mean_next, prompt_batches, stop_ids
from verify.engines.runners import HookedRunner, Runner
from verify.journal import Journal
from verify.report.findings import VerifyReport
from verify.report.measures import (
    Completion,
    Completions,
    Continuation,
    Share,
    Tally,
    TokenShift,
    Trivia,
)
from verify.work import Work

VARIANTS = ("base", "reconstruction", "unlearned", "prompted")
"""`prompted` is the base's runner, told something first."""
MAX_NEW_TOKENS = 10
SHIFTED_TOKENS = 35
"""How many of the tokens whose probability falls most, and of those where it rises most."""
FIRST_PART = 0.8
"""The share of the work that continuations are, for progress."""
Progress = Callable[[float], None]
"""Called with the share done, 0 to 1."""


def complete(
    recipe: Recipe,
    questions: Sequence[Question],
    runners: Mapping[str, Runner],
    engine: str,
    tokenizer: Any,
    letters: LetterTokens,
    journal: Journal,
    progress: Progress = lambda _share: None,
) -> Completions:
    """Let every variant go on with the recipe's prompts, and answer two-choice questions.

    Args:
        recipe: its `[verify.completions]` names the prompts; without that table there are none.
        questions: the forget questions, from which topic and trivia come where nothing else is
            named.
        runners: by the names base, reconstruction and unlearned.
        engine: what `unlearned` is called in the report.
        tokenizer: the base model's.
        letters: of that tokenizer.
        journal: keeps each batch of each variant.
        progress: called with the share done, 0 to 1.

    Raises:
        DataError: a source that the recipe names cannot be read, or has a bad row.
    """
    assert recipe.verify is not None
    named = recipe.verify.completions
    topic = topic_of(questions)
    instruction = default_instruction(topic)
    prompts: list[tuple[str, OpenPrompt]] = []
    words: list[str] = []
    asked = made_of(questions)
    if named is not None:
        instruction = named.instruction or instruction
        words = named.topic_words
        prompts += [("topic", p) for p in load_prompts(named.prompts, recipe, answered=True)]
        if named.generic is not None:
            rows = load_prompts(named.generic, recipe, answered=False)
            prompts += [("generic", p) for p in rows]
        if named.trivia is not None:
            asked = load_trivia(named.trivia, recipe, topic)
    work = _Work(runners, instruction, tokenizer, journal, progress)
    said = work.continuations([prompt.prompt for _, prompt in prompts])
    completions = _completions(prompts, said, words, tokenizer)
    falls, rises = work.shifts([p.prompt for source, p in prompts if source == "topic"])
    return Completions(
        engine=engine,
        max_new_tokens=MAX_NEW_TOKENS,
        instruction=instruction,
        prompts=completions,
        tallies=_tallies(completions, said),
        falls=falls,
        rises=rises,
        trivia=_trivia(asked, work, letters),
    )


# --------------------------------------------------------------------------- asking the engines

Said = dict[str, list[list[int]]]
"""Per variant and prompt, the tokens that it went on with, one that ended it included."""


@dataclass(frozen=True)
class _Work:
    """Engines, and how to ask them batch by batch."""

    runners: Mapping[str, Runner]
    instruction: str
    tokenizer: Any
    journal: Journal
    progress: Progress

    def continuations(self, texts: Sequence[str]) -> Said:
        """What each variant goes on with."""
        stops = stop_ids(self.tokenizer)
        return self._each(
            "continue",
            texts,
            lambda runner, batch: go_on(runner, batch, stops, MAX_NEW_TOKENS),
            lambda share: self.progress(FIRST_PART * share),
        )

    def letters(self, texts: Sequence[str], letters: LetterTokens) -> dict[str, list[int]]:
        """Whether each variant says A (0) or B (1)."""

        def choose(runner: Runner, batch: Batch) -> list[int]:
            logits = runner.logits(batch.input_ids, batch.attention_mask, last_only=True)
            return best_letters(logits[:, -1], letters.chat[:2])

        return self._each(
            "choose",
            texts,
            choose,
            lambda share: self.progress(FIRST_PART + (1 - FIRST_PART) * share),
        )

    def shifts(self, texts: Sequence[str]) -> tuple[tuple[TokenShift, ...], tuple[TokenShift, ...]]:
        """The tokens that fall most and those that rise most, from base to unlearned."""
        if not texts:
            return (), ()
        shown = prompt_batches(self._bare(texts), self.tokenizer)
        base, unlearned = self.runners["base"], self.runners["unlearned"]
        falls, rises = self.journal.once(
            f"completions shift {base.name} {unlearned.name} {_digest(shown)}",
            lambda: most_moved(mean_next(base, shown).numpy(), mean_next(unlearned, shown).numpy()),
        )
        return self._named(falls), self._named(rises)

    def _named(self, moved: Sequence[tuple[int, float, float]]) -> tuple[TokenShift, ...]:
        shifts = []
        for token, before, after in moved:
            text = self.tokenizer.convert_ids_to_tokens(token)  # None beyond the tokenizer's own
            shifts.append(TokenShift((text or f"<{token}>").replace("\u2581", " "), before, after))
        return tuple(shifts)

    def _bare(self, texts: Sequence[str]) -> list[str]:
        """Without the BOS that a prompt may spell: every prompt is given one."""
        return [text.removeprefix(self.tokenizer.bos_token or "") for text in texts]

    def _each(
        self,
        what: str,
        texts: Sequence[str],
        compute: Callable[[Runner, Batch], list[Any]],
        progress: Progress,
    ) -> dict[str, list[Any]]:
        """Per variant, what `compute` finds of every text, batch by batch."""
        found: dict[str, list[Any]] = {}
        for number, variant in enumerate(VARIANTS):
            runner, put = self.runners["base"], self._bare(texts)
            if variant == "prompted":
                put = [instructed(text, self.instruction) for text in put]
            else:
                runner = self.runners[variant]
            by_item: dict[int, Any] = {}
            shown = prompt_batches(put, self.tokenizer)
            for done, batch in enumerate(shown, 1):
                name = f"completions {what} {variant} {runner.name} {_digest([batch])}"
                rows = self.journal.once(name, partial(compute, runner, batch))
                by_item |= {p.item: row for p, row in zip(batch.prompts, rows, strict=True)}
                progress((number + done / len(shown)) / len(VARIANTS))
            found[variant] = [by_item[item] for item in range(len(texts))]
        return found


def most_moved(
    before: np.ndarray, after: np.ndarray
) -> tuple[list[tuple[int, float, float]], list[tuple[int, float, float]]]:
    """(token, before, after) of those that fall most, and of those that rise most.

    Args:
        before: [vocab] probabilities.
        after: [vocab] probabilities. Of two tokens that move alike, the one of smaller id is first.
    """
    change = after - before

    def first(order: np.ndarray) -> list[tuple[int, float, float]]:
        return [(int(i), float(before[i]), float(after[i])) for i in order[:SHIFTED_TOKENS]]

    falls, rises = np.argsort(change, kind="stable"), np.argsort(-change, kind="stable")
    return first(falls[change[falls] < 0]), first(rises[change[rises] > 0])


def _digest(shown: Sequence[Batch]) -> str:
    """Tells prompts from others: a piece of work is named by what it is done on."""
    prompts = [[(p.item, p.ids) for p in batch.prompts] for batch in shown]
    return hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:16]


# --------------------------------------------------------------------------- what they said


def _completions(
    prompts: Sequence[tuple[str, OpenPrompt]], said: Said, words: Sequence[str], tokenizer: Any
) -> tuple[Completion, ...]:
    """Prompts with every variant's continuation.

    A continuation refers to the topic where it holds one of `words`, or an answer that any prompt
    on the topic expects; what a generic prompt itself expects is no such reference.
    """
    answers = [answer for source, p in prompts for answer in p.answers if source == "topic"]
    about = list(dict.fromkeys((*words, *answers)))
    stops = stop_ids(tokenizer)
    found = []
    for item, (source, p) in enumerate(prompts):
        own = set(p.answers) if source == "generic" else set()
        topic = [phrase for phrase in about if phrase not in own]
        continuations = []
        for variant in VARIANTS:
            ids = said[variant][item]
            text = tokenizer.decode([i for i in ids if i not in stops])
            right = mentions(text, p.answers) if p.answers else None
            continuations.append(Continuation(variant, text, right, mentions(text, topic)))
        found.append(Completion(source, p.row, p.prompt, p.answers, tuple(continuations)))
    return tuple(found)


def _tallies(completions: Sequence[Completion], said: Said) -> tuple[Tally, ...]:
    """Every source that has prompts, variant by variant."""
    tallies = []
    for source in dict.fromkeys(completion.source for completion in completions):
        items = [item for item, c in enumerate(completions) if c.source == source]
        for number, variant in enumerate(VARIANTS):
            ones = [completions[item].continuations[number] for item in items]
            right = [one.right for one in ones if one.right is not None]
            same = [said[variant][item] == said["base"][item] for item in items]
            tallies.append(
                Tally(
                    source=source,
                    variant=variant,
                    right=Share(sum(right), len(right)) if right else None,
                    on_topic=Share(sum(one.on_topic for one in ones), len(ones)),
                    as_base=Share(sum(same), len(same)),
                )
            )
    return tuple(tallies)


def _trivia(asked: Sequence[TwoChoice], work: _Work, letters: LetterTokens) -> tuple[Trivia, ...]:
    """Every variant on questions with two choices; nothing where there are none."""
    if not asked:
        return ()
    right = right_letters(len(asked))
    texts = [trivia_text(one, letter) for one, letter in zip(asked, right, strict=True)]
    return tuple(
        Trivia(
            variant=variant,
            share=Share(sum(a == b for a, b in zip(chosen, right, strict=True)), len(right)),
            letters=(chosen.count(0), chosen.count(1)),
        )
        for variant, chosen in work.letters(texts, letters).items()
    )


def gather(work: Work, report: VerifyReport) -> VerifyReport:
    """Add texts of four variants, side by side."""
    from verify.reference.oracle import Oracle, reconstruct_residual

    hooked, material = work.hooked, work.hooked.material
    dropped = Oracle(hooked.model, hooked.sites, reconstruct_residual)
    found = complete(
        work.recipe,
        material.questions["forget"],
        {
            "base": hooked.base,
            "reconstruction": HookedRunner("reconstruction", hooked.model, dropped),
            "unlearned": work.unlearned,
        },
        work.unlearned.name,
        material.tokenizer,
        material.letters,
        work.journal,
        lambda share: work.progress("completions", share),
    )
    return replace(report, completions=found)


def check(recipe: Recipe) -> None:
    """Read what only completions read: a bad row is known before hours of work."""
    named = None if recipe.verify is None else recipe.verify.completions
    if named is None:
        return
    load_prompts(named.prompts, recipe, answered=True)
    if named.generic is not None:
        load_prompts(named.generic, recipe, answered=False)
    if named.trivia is not None:
        load_trivia(named.trivia, recipe, topic=None)
