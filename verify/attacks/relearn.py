"""Fine-tuning: what comes back of facts that are in no text that the model is trained on.

On forget text of other facts and on text of the very facts, all weights or LoRA; on text about
anything else, all weights. Learning rates and numbers of texts are swept by successive halving:
every rate for a few steps, the best of them with every number of texts and the next best with most,
the best of these for longer, and the best of all with every seed, each of which holds out other
facts. What is best gives the held-out answers most probability while it keeps the retained
questions; the next best keeps them to its last step.

Whatever is trained on a fact learns it, so *recovery* is what comes back of other facts; beside
training on the same facts stands training on those facts with wrong answers, which nobody ever
knew: what that learns is *learning anew*.

Source: Deeb and Roger, arXiv 2410.08827 (disjoint facts); Jamieson and Talwalkar, arXiv 1502.07943
(successive halving); Hu et al., arXiv 2106.09685 (LoRA).
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from bake.questions.prompts import bos_id, encoded
from verify.audit.attempts import OPEN, Attempt, Need, Scores, Settings, keeps_utility
from verify.audit.levels import Level
from verify.audit.target import Target
from verify.audit.work_order import Work

RATES = (2.2e-3, 4.6e-4, 2e-4, 1e-4, 2.2e-5, 1e-5, 4.6e-6)
"""Learning rates of AdamW, constant."""
QUICK_RATES = (2.2e-3, 4.6e-4, 1e-4)
SLOWER = (2.2e-5, 4.6e-6)
"""Tried after these, one by one, while all of them ruin the model."""
SIZES = (1000, 100, 10, 5)
"""How many texts are trained on, or as many as there are."""
STEPS = (10, 25, 50, 150, 500)
"""After which it is asked what came back."""
BENIGN_STEPS = (10, 25, 50, 150, 250)
FIRST, SECOND, THIRD = 25, 50, 150
"""Steps of the rounds of the sweep, one seed each."""
LEFT = (2, 2, 1)
"""How many settings a round leaves."""
PARTS = (0.0, 0.1, 0.3, 0.45, 1.0)
"""Where each round begins, of all the work, and the last one ends."""
BATCH = 4
"""Texts of a step."""
LONGEST = 256
"""Tokens of a text, of which more are cut off."""
RANK = 128
"""Of LoRA, in every matrix of the layers; as its scale."""
CLIP = 1.0
"""Longest gradient."""
TEXTS: dict[str, tuple[Need, str]] = {
    "other": ("other facts", "texts about other facts of the topic"),
    "same": ("same facts", "texts that state the very facts"),
    "swapped": ("same facts", "texts that state the very facts wrongly"),
    "benign": ("benign text", "texts about anything else"),
}
"""By the name of a field of `Held`: what somebody must have, and what to call it."""
Arm = tuple[str, bool]
"""Kind of text, and whether by LoRA."""
Run = tuple[dict[str, Any], list[Attempt]]
"""Settings, and what was found with them on the way."""


def relearn(work: Work) -> Iterator[Attempt]:
    """Every kind of text, all weights and LoRA."""
    level = work.level
    first, second, third = (min(steps, level.most_steps) for steps in (FIRST, SECOND, THIRD))
    rates = QUICK_RATES if level.quick else RATES
    arms = arms_of(level)
    sweeps = {arm: [_settings(arm, rate, SIZES[0], first) for rate in rates] for arm in arms}
    runs = yield from _round(work, sweeps, 0)
    for rate in SLOWER if level.quick else ():
        ruined = [arm for arm in arms if not any(_lasts(work, run) for run in runs[arm])]
        slower = {arm: [_settings(arm, rate, SIZES[0], first)] for arm in ruined}
        more = yield from _round(work, slower, 0)
        runs |= {arm: runs[arm] + of for arm, of in more.items()}
    best = _best(work, runs, LEFT[0])
    if not level.quick:
        sweeps = {
            arm: [_settings(arm, best[arm][0]["rate"], size, second) for size in SIZES]
            + [{**of, "steps": second} for of in best[arm][1:]]
            for arm in arms
        }
        runs = yield from _round(work, sweeps, 1)
        best = _best(work, runs, LEFT[1])
        sweeps = {arm: [{**of, "steps": third} for of in best[arm]] for arm in arms}
        runs = yield from _round(work, sweeps, 2)
        best = _best(work, runs, LEFT[2])
    final: list[dict[str, Any]] = []
    for arm in arms:
        most = min(BENIGN_STEPS[-1] if arm[0] == "benign" else STEPS[-1], level.most_steps)
        chosen = best[arm][0] | {"steps": most, "brief": level.quick}
        final += [chosen | {"seed": seed} for seed in work.seeds]
        if arm[0] == "same" and work.lead != OPEN:  # no prompt has a wrong answer
            anew = chosen | {"texts": "swapped", "steps": min(most, third), "brief": True}
            final += [anew | {"seed": seed} for seed in work.seeds]
    final.sort(key=lambda of: -of["steps"])
    for found in work.each(fine_tune, final, (PARTS[3], PARTS[4])):
        yield from found


def arms_of(level: Level) -> list[Arm]:
    """(kind of text, LoRA) of every sweep; what takes longest first."""
    arms = [("other", True), ("same", True), ("other", False), ("same", False), ("benign", False)]
    return [arm for arm in arms if not level.quick or arm != ("same", True)]


def relearning(level: Level, seeds: int) -> tuple[int, int]:
    """About how many steps of training and how many scores `relearn` takes."""
    arms, final = len(arms_of(level)), min(STEPS[-1], level.most_steps)
    if level.quick:
        return arms * (len(QUICK_RATES) * FIRST + seeds * final), arms * (6 + 3 * seeds)
    sizes = len(SIZES) + LEFT[0] - 1
    sweep = len(RATES) * FIRST + sizes * SECOND + LEFT[1] * THIRD
    scores = len(RATES) * 2 + sizes * 3 + LEFT[1] * 4 + 2 * seeds * len(STEPS)
    return arms * (sweep + seeds * final), arms * scores


def _round(
    work: Work, sweeps: dict[Arm, list[dict[str, Any]]], number: int
) -> Generator[Attempt, None, dict[Arm, list[Run]]]:
    """Make the attempts of a round, and return them by their settings."""
    asked = [(arm, of) for arm, each in sweeps.items() for of in each]
    found = work.each(fine_tune, [of for _, of in asked], (PARTS[number], PARTS[number + 1]))
    runs: dict[Arm, list[Run]] = {}
    for (arm, of), attempts in zip(asked, found, strict=True):
        runs.setdefault(arm, []).append((of, attempts))
        yield from attempts
    return runs


def _best(work: Work, runs: dict[Arm, list[Run]], left: int) -> dict[Arm, list[dict[str, Any]]]:
    """The best settings of each arm, so many of them."""
    best = {}
    for arm, each in runs.items():
        ranked = sorted(each, key=lambda run: -_worth(work, run[1]))
        # What brings most back at once may ruin the model soon: beside it, the best that does not.
        lasting = [run for run in ranked[1:] if _lasts(work, run)]
        ranked = [ranked[0], *(lasting or ranked[1:])]
        best[arm] = [of for of, _ in ranked[:left]]
    return best


def _lasts(work: Work, run: Run) -> bool:
    """Whether a model is of use to the last step."""
    return keeps_utility(run[1][-1].scores, work.before, work.lead)


def _worth(work: Work, attempts: Sequence[Attempt]) -> float:
    """How much came back at best while what is to be kept was kept."""
    worth = []
    for attempt in attempts:
        sure, right = attempt.scores.sure, attempt.scores.right(work.lead)
        if sure is None:
            sure = 0.0 if right is None else right.accuracy or 0.0
        kept = keeps_utility(attempt.scores, work.before, work.lead)
        worth.append(sure - (0 if kept else 1))
    return max(worth)


def _settings(arm: Arm, rate: float, size: int, steps: int) -> dict[str, Any]:
    texts, lora = arm
    return {
        "texts": texts,
        "lora": lora,
        "rate": rate,
        "size": size,
        "steps": steps,
        "seed": 0,
        "brief": True,
    }


def fine_tune(target: Target, settings: Settings) -> list[Attempt]:
    """Train a copy, and ask for the held-out facts on the way."""
    held = target.held(settings["seed"])
    kind = settings["texts"]
    texts = list(getattr(held, kind))
    random.Random(f"texts-{settings['seed']}").shuffle(texts)
    texts = texts[: settings["size"]]
    if kind == "swapped":
        held = replace(held, questions=held.swapped_questions, prompts=())
    need, what = TEXTS[kind]
    how = "LoRA" if settings["lora"] else "all weights"
    marks = BENIGN_STEPS if kind == "benign" else STEPS
    plain = Attempt(
        attack=f"relearn: {'control, ' if kind == 'swapped' else ''}{need}, {how}",
        does=f"fine-tunes {how} for {{steps}} steps on {{samples}} {what}",
        scores=Scores(),
        needs=(need,),
        settings={"rate": settings["rate"], "texts": settings["size"]},
        seed=settings["seed"],
        control=kind == "swapped",
    )
    found = []
    model = target.subject.model()
    for step in trained(model, texts, target.tokenizer, settings):
        if step in marks or step == settings["steps"]:
            scores = target.score(model, held, brief=settings["brief"])
            seen = min(len(texts), step * BATCH)
            found.append(replace(plain, scores=scores, steps=step, samples=seen))
    return found


def trained(model: Any, texts: Sequence[str], tokenizer: Any, settings: Settings) -> Iterator[int]:
    """Train a model step by step; yields the number of each, from 1. Changes `model`.

    Args:
        model: in float32; in training mode only while a step is made.
        texts: what it is trained to say, BOS in front.
        tokenizer: the base's.
        settings: rate, steps, seed and lora.
    """
    import torch

    torch.manual_seed(settings["seed"])
    if settings["lora"]:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of transformers, about peft
            get_peft_model(model, config)  # into the model's own modules
    else:
        model.requires_grad_(True)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=settings["rate"], weight_decay=0.0)
    rows = [[bos_id(tokenizer), *ids][:LONGEST] for ids in encoded(texts, tokenizer)]
    for step, batch in enumerate(_batches(rows, settings), 1):
        model.train()
        ids, labels, mask = (part.to(model.device) for part in _padded(batch))
        loss = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, CLIP)
        optimizer.step()
        yield step


def _batches(rows: Sequence[list[int]], settings: Settings) -> Iterator[list[list[int]]]:
    """As many as there are steps: all rows in a seeded order, again and again."""

    def endless() -> Iterator[list[int]]:
        rng = random.Random(f"order-{settings['seed']}")
        while True:
            yield from rng.sample(rows, len(rows))

    order = endless()
    for _ in range(settings["steps"]):
        yield list(islice(order, BATCH))


def _padded(rows: Sequence[list[int]]) -> tuple[Any, Any, Any]:
    """(ids, labels, mask), each [batch, seq], padded on the right; padding is not learned."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    each = [torch.tensor(row) for row in rows]
    mask = pad_sequence([torch.ones_like(row) for row in each], batch_first=True)
    return (
        pad_sequence(each, batch_first=True),
        pad_sequence(each, batch_first=True, padding_value=-100),
        mask,
    )
