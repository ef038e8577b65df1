"""Completions: what a model says, beside what it was to forget.

Greedy continuations of a few tokens by four variants: the base, the bare reconstruction (what the
SAE alone costs), the unlearned model, and the base with an instruction in front. Beside them the
tokens whose probability moved most, and questions with two choices.

Source: the blog report *Sparse Autoencoders for Improving Unlearning in Large Language Models*.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from bake.questions.answers import LetterTokens
from bake.questions.multiple_choice import Question
from bake.questions.open_prompts import (
    OpenPrompt,
    default_instruction,
    load_prompts,
    mentions,
    topic_of,
)
from bake.questions.trivia import TwoChoice, load_trivia, made_of, right_letters, trivia_text
from bake.recipe import Recipe
from verify.compare.comparison import REFERENCE
from verify.engines.continuing import stop_ids
from verify.engines.runners import Runner
from verify.evidence.asking import MAX_NEW_TOKENS, VARIANTS, Asking, Progress, Said
from verify.evidence.controls import control_runners
from verify.journal import Journal
from verify.material import evenly
from verify.report.findings import VerifyReport
from verify.report.measures import (
    Completion,
    Completions,
    Continuation,
    Continued,
    Share,
    Tally,
    Trivia,
)
from verify.work import Work


def complete(
    recipe: Recipe,
    questions: Sequence[Question],
    runners: Mapping[str, Runner],
    engine: str,
    tokenizer: Any,
    letters: LetterTokens,
    journal: Journal,
    progress: Progress = lambda _share: None,
    one_in: int = 1,
) -> Completions:
    """Let every variant and engine go on with the recipe's prompts, and the variants answer
    two-choice questions.

    Args:
        recipe: its `[verify.completions]` names the prompts; without that table there are none.
        questions: the forget questions, from which topic and trivia come where nothing else is
            named.
        runners: by the names base, unlearned and, where there is one, reconstruction; and other
            engines by their own, `reference` among them.
        engine: what `unlearned` is called in the report.
        tokenizer: the base model's.
        letters: of that tokenizer.
        journal: keeps each batch of each variant.
        progress: called with the share done, 0 to 1.
        one_in: of the prompts, one in so many is put.

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
        for source, rows in open_prompts(recipe).items():
            prompts += [(source, p) for p in evenly(rows, one_in)]
        if named.trivia is not None:
            asked = load_trivia(named.trivia, recipe, topic)
    asked = evenly(asked, one_in)
    work = Asking(runners, instruction, tokenizer, journal, progress)
    said = work.continuations([prompt.prompt for _, prompt in prompts])
    completions = _completions(prompts, said, words, tokenizer)
    falls, rises = work.shifts([p.prompt for source, p in prompts if source == "topic"])
    engines = {name: of for name, of in said.items() if name not in VARIANTS}
    if REFERENCE in engines:
        engines[engine] = said["unlearned"]
    return Completions(
        engine=engine,
        max_new_tokens=MAX_NEW_TOKENS,
        instruction=instruction,
        prompts=completions,
        tallies=_tallies(completions, said),
        falls=falls,
        rises=rises,
        trivia=_trivia(asked, work, letters),
        engines=tuple(
            _continued(name, of, engines[REFERENCE], prompts, tokenizer)
            for name, of in engines.items()
            if prompts
        ),
    )


def open_prompts(recipe: Recipe) -> dict[str, list[OpenPrompt]]:
    """A recipe's prompts, of `topic` and, where it names some, `generic`.

    Raises:
        DataError: a source cannot be read, or has a bad row.
    """
    named = None if recipe.verify is None else recipe.verify.completions
    if named is None:
        return {}
    found = {"topic": load_prompts(named.prompts, recipe, answered=True)}
    if named.generic is not None:
        found["generic"] = load_prompts(named.generic, recipe, answered=False)
    return found


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
        for variant in (name for name in VARIANTS if name in said):
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
        for number, variant in enumerate(name for name in VARIANTS if name in said):
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


def _continued(
    engine: str,
    said: Sequence[Sequence[int]],
    expected: Sequence[Sequence[int]],
    prompts: Sequence[tuple[str, OpenPrompt]],
    tokenizer: Any,
) -> Continued:
    """One engine's continuations, beside the reference's."""
    stops = stop_ids(tokenizer)
    right: dict[str, list[bool]] = {"topic": [], "generic": []}
    for ids, (source, p) in zip(said, prompts, strict=True):
        if p.answers:
            text = tokenizer.decode([i for i in ids if i not in stops])
            right[source].append(mentions(text, p.answers))
    shares = {name: Share(sum(of), len(of)) if of else None for name, of in right.items()}
    same = [ours == theirs for ours, theirs in zip(said, expected, strict=True)]
    return Continued(engine, shares["topic"], shares["generic"], Share(sum(same), len(same)))


def _trivia(asked: Sequence[TwoChoice], work: Asking, letters: LetterTokens) -> tuple[Trivia, ...]:
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
    runners = {"base": hooked.base, "unlearned": work.unlearned}
    runners |= {of.name: of for of in (*hooked.references, *work.engines[1:])}
    controls = dict(work.controls) if "controls" in work.kinds else {}
    if not controls and all(site.reconstructs for site in hooked.sites):
        controls["reconstruction"] = Oracle(hooked.model, hooked.sites, reconstruct_residual)
    runners |= control_runners(hooked.model, controls)
    found = complete(
        work.recipe,
        material.questions["forget"],
        runners,
        work.unlearned.name,
        material.tokenizer,
        material.letters,
        work.journal,
        lambda share: work.progress("completions", share),
        material.one_in,
    )
    return replace(report, completions=found)


def check(recipe: Recipe) -> None:
    """Read what only completions read: a bad row is known before hours of work."""
    open_prompts(recipe)
    named = None if recipe.verify is None else recipe.verify.completions
    if named is not None and named.trivia is not None:
        load_trivia(named.trivia, recipe, topic=None)
