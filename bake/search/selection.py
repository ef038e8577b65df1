"""`features = "select"`: from a recipe's corpora to feature numbers, and what speaks for each."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bake.clamp import ClampWeights
from bake.errors import DataError, RecipeError
from bake.questions.answers import LetterTokens, letter_tokens
from bake.questions.corpora import special_ids
from bake.questions.multiple_choice import Question, load_questions
from bake.questions.orders import orders_in
from bake.questions.prompts import Batch, Prompt, left_padded, prompts_of
from bake.recipe import PromptForm, Recipe
from bake.search.attribution import (
    attribution,
    candidates,
    letter_margin,
    residual_gradient,
    text_margin,
)
from bake.search.bench import Bench, Clamper, bench_of
from bake.search.corpus_statistics import (
    Material,
    Measured,
    Progress,
    SiteStatistics,
    measure,
    select_table,
)
from bake.search.select import Chosen, Scores, by_attribution, by_ratio, by_sparsity, prove_alone
from bake.search.statistics import FeatureSite

VALIDATION_SHARE = 0.4
"""Of [verify]'s questions, the part that selection and sweeps may look at where [select] names
none of its own."""
SELECTION_ROUNDING = 0.01
"""By how much of itself a share of tokens may differ between machines: in 16 bits, gates near their
threshold open here and stay shut there."""
CANDIDATES_PER_FEATURE = 8
"""attribution: for each feature that is wanted, how many are tried alone at most."""


@dataclass(frozen=True)
class Selection:
    """What was selected for one [[clamp]] table."""

    sae: str
    hook_point: str
    by: str
    d_sae: int
    forget_tokens: int
    """Tokens of the forget corpus that were counted."""
    retain_tokens: int
    chosen: tuple[Chosen, ...]

    @property
    def features(self) -> list[int]:
        """In the order of their rank."""
        return [chosen.feature for chosen in self.chosen]


@dataclass(frozen=True)
class SplitQuestions:
    """Questions that settings may be picked on, and those that only report."""

    validation: dict[str, list[Question]]
    """forget and retain."""
    test: dict[str, list[Question]]


def selected_recipe(
    recipe: Recipe,
    *,
    cache: Path | None = None,
    progress: Progress = lambda _what, _share: None,
    measured: Measured | None = None,
    device: str = "cpu",
) -> tuple[Recipe, list[Selection]]:
    """The recipe with feature numbers in place of "select", and why these.

    A recipe that names all its features comes back as it is.

    Args:
        recipe: with a [select] table where it leaves features open.
        cache: folder for statistics; the user's cache folder by default.
        progress: told how far it is.
        measured: its statistics, where they were taken already.
        device: as torch names it, where the model runs; that of `measured` where there are some.

    Raises:
        BakeoutError: of the kind of trouble it meets.
    """
    if not recipe.selects:
        return recipe, []
    if measured is None:
        material = Material(recipe, device)
        measured = measure(recipe, material=material, cache=cache, progress=progress)
    clamps, selections = [], []
    for index, clamp in enumerate(recipe.clamp):
        if clamp.features != "select":
            clamps.append(clamp)
            continue
        selection = select_features(recipe, measured, index, progress)
        selections.append(selection)
        clamps.append(clamp.model_copy(update={"features": selection.features}))
    return recipe.with_clamps(clamps), selections


def select_features(
    recipe: Recipe, measured: Measured, index: int, progress: Progress = lambda _what, _share: None
) -> Selection:
    """Select the features of one [[clamp]] table.

    Args:
        recipe: whose [select] table says how.
        measured: its statistics.
        index: of the table.
        progress: told how far attribution is.
    """
    select = select_table(recipe)
    found = measured.sites[index]
    refusal = found.site.clamp.refusal_feature
    exclude = [] if refusal is None else [refusal]
    both, n = (found.forget, found.retain), select.n_features
    if select.by == "sparsity":
        chosen = by_sparsity(
            *both, retain_threshold=select.retain_threshold, n_features=n, exclude=exclude
        )
    elif select.by == "ratio":
        chosen = by_ratio(*both, percentile=select.ratio_percentile, n_features=n, exclude=exclude)
    else:
        chosen = _attributed(recipe, measured, found, exclude, progress)
    return Selection(
        sae=found.site.name,
        hook_point=found.site.hook_point,
        by=select.by,
        d_sae=found.site.d_sae,
        forget_tokens=found.forget.n_tokens,
        retain_tokens=found.retain.n_tokens,
        chosen=tuple(chosen),
    )


# --------------------------------------------------------------------------- questions


def still_selected(
    recipe: Recipe, measured: Measured, index: int, selection: Selection, features: Sequence[int]
) -> bool:
    """Whether features are those that were selected for a [[clamp]] table, in any order; or, by
    sparsity, such as another machine's rounding puts in their place.

    Args:
        recipe: whose [select] table says how.
        measured: its statistics.
        index: of the table.
        selection: of the table.
        features: that are named elsewhere.
    """
    if sorted(features) == sorted(selection.features):
        return True
    select, found = select_table(recipe), measured.sites[index]
    if select.by != "sparsity" or len(set(features)) != len(selection.features):
        return False
    forget, retain = found.forget.share, found.retain.share
    least = min(chosen.forget_share for chosen in selection.chosen)
    return all(
        0 <= f < selection.d_sae
        and f != found.site.clamp.refusal_feature
        and forget[f] >= least * (1 - SELECTION_ROUNDING)
        and retain[f] < select.retain_threshold * (1 + SELECTION_ROUNDING)
        for f in features
    )


def split_questions(recipe: Recipe) -> SplitQuestions:
    """The recipe's questions for picking and for reporting; no question is in both.

    Where [select] names questions, those are for picking and [verify]'s for reporting. Where it
    does not, [verify]'s are split, in an order drawn from their number.

    Raises:
        RecipeError: there is no [verify] table.
        DataError: a question of [select] is also one of [verify].
    """
    if recipe.verify is None:
        raise RecipeError(
            "the recipe has no [verify] table; expected one, since attribution and sweeps need "
            "questions"
        )
    validation, test = {}, {}
    for side in ("forget", "retain"):
        report = load_questions(getattr(recipe.verify, f"{side}_questions"), recipe)
        named = getattr(recipe.select, f"{side}_questions", None)
        if named is not None:
            picking = load_questions(named, recipe)
            if both := {q.question for q in picking} & {q.question for q in report}:
                raise DataError(
                    f"{side} questions: [select] and [verify] share {len(both)}, the first is "
                    f'"{min(both)}"; expected two splits without a common question'
                )
        else:
            order = random.Random(len(report)).sample(range(len(report)), len(report))
            cut = max(1, round(VALIDATION_SHARE * len(report)))
            if cut == len(report):
                raise DataError(
                    f"{side} questions: one alone cannot be split; name others in [select]"
                )
            picking = [report[i] for i in sorted(order[:cut])]
            report = [report[i] for i in sorted(order[cut:])]
        validation[side], test[side] = picking, report
    return SplitQuestions(validation, test)


# --------------------------------------------------------------------------- attribution


def _attributed(
    recipe: Recipe,
    measured: Measured,
    measured_site: SiteStatistics,
    exclude: list[int],
    progress: Progress,
) -> list[Chosen]:
    """Known questions → attribution → what each candidate does alone → order by loss added."""
    select, split = select_table(recipe), split_questions(recipe)
    assert recipe.verify is not None
    material, form, site = measured.material, recipe.verify.prompt, measured_site.site
    tokenizer, letters = material.tokenizer, letter_tokens(material.tokenizer)
    clamper = Clamper(site)
    turned = [order for q in split.validation["forget"] for order in orders_in(q, form)]
    n_orders = len(turned) // len(split.validation["forget"])

    def bench(prompts: Sequence[Prompt], what: str) -> Bench:
        return bench_of(material, prompts, site.layer, what, progress)

    orders = f"{n_orders} orders of each question" if n_orders > 1 else "each question"
    answers = bench(prompts_of({"forget": turned}, tokenizer, [form]), orders).base.letters
    known = [
        item
        for item in range(0, len(turned), n_orders)
        if all(answers["forget", form, i] == turned[i].answer for i in range(item, item + n_orders))
    ]
    if not known:
        raise DataError(
            f"selection by attribution: of {len(split.validation['forget'])} forget questions none "
            f"is answered right{' under all 24 orders' if n_orders > 1 else ''}, so none is known; "
            "select by sparsity"
        )
    known_orders = [order for item in known for order in turned[item : item + n_orders]]
    prompts = prompts_of({"forget": known_orders}, tokenizer, [form])
    as_written = [turned[item] for item in known]
    per_question = _attributions(as_written, form, measured, clamper, letters)
    for scores in per_question:
        scores[exclude] = -1.0
    proposed = candidates(per_question, CANDIDATES_PER_FEATURE * select.n_features)
    forget = bench(prompts, "known questions")
    asked = {"retain": split.validation["retain"]}
    retain = bench(prompts_of(asked, tokenizer, [form]), "retained questions")
    text = bench(_corpus_prompts(measured), "retained text")
    base_loss = text.base.loss

    def alone(feature: int) -> list[ClampWeights]:
        clamp = site.clamp.model_copy(update={"features": [feature]})
        return [clamper.weights(clamp)]

    def breaks(feature: int) -> bool:
        progress("features alone", proposed.index(feature) / len(proposed))
        return forget.changes(alone(feature))

    proved = prove_alone(
        proposed,
        breaks=breaks,
        spares=lambda feature: not retain.changes(alone(feature)),
        loss_added=lambda feature: text.measure(alone(feature)).loss - base_loss,
    )
    total: Scores = sum(per_question[1:], start=per_question[0])
    return by_attribution(
        measured_site.forget, measured_site.retain, total, proved, n_features=select.n_features
    )


def _attributions(
    questions: Sequence[Question],
    form: PromptForm,
    measured: Measured,
    clamper: Clamper,
    letters: LetterTokens,
) -> list[Scores]:
    """[d_sae] for each question, over all positions but the markers."""
    model, layer = measured.material.model, clamper.site.layer
    tokenizer = measured.material.tokenizer
    feature_site = FeatureSite(layer, clamper.encoder)
    W_dec = torch.from_numpy(clamper.W_dec).to(model.device)
    special = torch.tensor([of for of in special_ids(tokenizer) if of is not None])
    scores = []
    for question in questions:
        total = np.zeros(clamper.W_dec.shape[0])
        for prompt in prompts_of({"forget": [question]}, tokenizer, [form]):
            asked = left_padded([prompt], pad_id=0, last_only=True)
            margin = partial(_margin, asked, question.answer, letters)
            h, gradient = residual_gradient(model, layer, asked, margin)
            counted = ~torch.isin(asked.input_ids[0], special).to(model.device)
            total += attribution(h[counted], gradient[counted], feature_site, W_dec)
        scores.append(total)
    return scores


def _margin(asked: Batch, answer: int, letters: LetterTokens, logits: Tensor) -> Tensor:
    if asked.of_choices:
        return text_margin(logits, asked, answer)
    return letter_margin(logits[0, -1], getattr(letters, asked.prompts[0].form), answer)


def _corpus_prompts(measured: Measured, most_tokens: int = 16_384) -> list[Prompt]:
    """The first windows of the retain corpus, as text to take the loss of."""
    ids = measured.corpora["retain"].ids
    return [
        Prompt("text", "text", row, tuple(window.tolist()), every_token=True)
        for row, window in enumerate(ids[: max(1, most_tokens // ids.shape[1])], 1)
    ]
