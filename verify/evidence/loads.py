"""Loads: what becomes of the clamp in each way in which stock loaders take a folder?

A loader that casts a folder to another dtype, or rounds its weights, says nothing of it. So the
folder is loaded so, one way after another in its own process, and shown a few prompts on which the
clamp fires: from the first firing on, its distance to the hook is told beside that to the base. It
may do the same, round, refuse, or break; a folder that quietly becomes the base is a failure, and
so is a load for which memory or time ran out, since nobody knows whether it does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from bake.errors import BakeoutError, FolderError, RanOutError
from bake.questions.prompts import Batch
from bake.rounding import BASE_LIKE, LOADS, MIN_EFFECT, REFUSES, UNTRIED, load_word
from verify.compare.comparison import REFERENCE
from verify.compare.logits import compare_logits
from verify.engines.engines import TreeTurn
from verify.engines.runners import HookedRunner, Runner
from verify.report.findings import Failure, VerifyReport
from verify.report.wording import number
from verify.work import Work

if TYPE_CHECKING:
    from torch import Tensor

    from verify.reference.oracle import Oracle

PROMPTS = 4
"""On which the clamp fires, that are shown."""
TOKENS = 24
"""Of each, from the first firing on, that are looked at: a large vocabulary's take a megabyte."""
STORED = "as compared"
"""The load in which everything else is measured."""
_NOTHING = dict.fromkeys(("kl_to_hook", "kl_to_base", "effect"))


@dataclass(frozen=True)
class Loaded:
    """One engine as it was loaded once."""

    engine: str
    load: str
    """One of `LOADS`, or `STORED`."""
    kl_to_hook: float | None
    """Mean, nats per token; None where something is not finite, like the next two."""
    kl_to_base: float | None
    effect: float | None
    """Share of the clamp's effect that is shown, 1 being all of it."""
    word: str
    """Of `load_word`, or that it refuses, or was not measured."""

    @property
    def why(self) -> str:
        """Why there are no distances."""
        reasons = {REFUSES: "nothing was said", UNTRIED: "memory or time ran out"}
        return reasons.get(self.word, "not finite")


def gather(work: Work, report: VerifyReport) -> VerifyReport:
    """Add what every engine says as it is compared, and the folder in torch in each of `LOADS`."""
    found = work.journal.once("loads", lambda: _tried(work))
    return replace(report, more={**report.more, "loads": found})


def _tried(work: Work) -> list[dict[str, Any]]:
    from verify.reference.oracle import Oracle

    # Whose counts of firings nobody else reads.
    oracle = Oracle(work.hooked.model, work.hooked.sites)
    reference = HookedRunner(REFERENCE, work.hooked.model, oracle)
    shown = [*_fired_on(work, reference, oracle)]
    if not shown:
        return []
    hook, base = (_said(runner, shown) for runner in (reference, work.hooked.base))
    rows = []

    def add(engine: Runner, load: str) -> None:
        found = compared(_said(engine, shown), hook, base)
        rows.append({"engine": engine.name, "load": load, **found})

    for engine in work.engines:
        add(engine, STORED)
    if isinstance(engine := work.unlearned, TreeTurn):  # in torch
        for load, (dtype, bits) in LOADS.items():
            if (dtype, bits) == (work.hooked.dtype, None):
                rows.append({**rows[0], "load": load})
                continue
            try:
                with work.otherwise(dtype, bits) as otherwise:
                    add(otherwise, load)
            except FolderError as error:  # that it runs at all was seen before
                word = UNTRIED if isinstance(error, RanOutError) else REFUSES
                rows.append({"engine": engine.name, "load": load, **_NOTHING, "word": word})
    return rows


def _fired_on(work: Work, reference: Runner, oracle: Oracle) -> Iterator[tuple[Batch, Tensor]]:
    """A few prompts one by one, forget questions first, and the first tokens [1, seq] from the
    first firing on.
    """
    material = work.hooked.material
    prompts = [p for p in material.prompts({"questions"}, compared=True) if p.source == "forget"]
    left = PROMPTS
    for prompt in (*prompts, *material.windows):
        (batch,) = material.batches([prompt])
        reference.logits(batch.input_ids, batch.attention_mask)
        assert oracle.last_fired is not None
        after = oracle.last_fired.cpu().cumsum(dim=-1) > 0
        if after.any():
            yield batch, after & (after.cumsum(dim=-1) <= TOKENS)
            left -= 1
        if not left:
            return


def _said(runner: Runner, shown: list[tuple[Batch, Tensor]]) -> Tensor:
    """[tokens, vocab] logits."""
    import torch

    return torch.cat(
        [runner.logits(batch.input_ids, batch.attention_mask, wanted) for batch, wanted in shown]
    )


def compared(said: Tensor, hook: Tensor, base: Tensor) -> dict[str, Any]:
    """How far from hook and base something is, and the word for it.

    Args:
        said: [tokens, vocab] logits, or log-probabilities.
        hook: what the hooked reference says there.
        base: what the base says there.

    Returns:
        `kl_to_hook` and `kl_to_base`, mean, in nats per token, `effect`, the share of the clamp's
        effect that is shown, each None where it is not finite; and `word`.
    """
    to_hook, to_base = (float(compare_logits(of, said).kl.mean()) for of in (hook, base))
    shown = wanted = 0.0
    for of_hook, of_base, own in zip(hook, base, said, strict=True):  # token by token: it is large
        true = of_hook.double() - of_base.double()
        shown += float((own.double() - of_base.double()) @ true)
        wanted += float(true @ true)
    effect = shown / wanted if wanted else math.nan
    word = load_word(to_hook, to_base, effect)
    numbers = {"kl_to_hook": to_hook, "kl_to_base": to_base, "effect": effect}
    finite = {name: value if abs(value) < float("inf") else None for name, value in numbers.items()}
    return {**finite, "word": word}


def failures(report: VerifyReport) -> Iterator[Failure]:
    """Loads in which the folder quietly is the base, or may be."""
    for row in loaded(report):
        if row.word == UNTRIED:
            yield Failure("loads", row.engine, row.load, f"{UNTRIED}: {row.why}", "a load")
        if row.word == BASE_LIKE:
            what = f"{row.load}: {BASE_LIKE}, share of the clamp's effect"
            yield Failure("loads", row.engine, what, row.effect, MIN_EFFECT)


def lines(report: VerifyReport) -> Iterator[str]:
    """Each load, in a line."""
    for row in loaded(report):
        far = row.why
        if row.kl_to_hook is not None and row.kl_to_base is not None:
            hook, base = number(row.kl_to_hook), number(row.kl_to_base)
            far = f"mean KL {hook} to the hook, {base} to the base"
        yield f"loads      {row.engine} {row.load}: {row.word}; {far}"


def loaded(report: VerifyReport) -> list[Loaded]:
    """What was found, which may come from a file.

    Raises:
        BakeoutError: it is no list of loads.
    """
    try:
        return TypeAdapter(list[Loaded]).validate_python(report.more.get("loads", []))
    except ValidationError as error:
        first = error.errors()[0]
        raise BakeoutError(
            f"report: loads.{'.'.join(map(str, first['loc']))}: {first['msg']}; write "
            "it again with `bakeout verify FOLDER --recipe RECIPE --json FILE`"
        ) from error
