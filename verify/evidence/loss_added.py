"""Loss added: what an engine's token losses on text are above the base's."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from bake.questions.prompts import TEXT
from verify.compare.comparison import BASE, REFERENCE
from verify.compare.loss_split import histogram, split
from verify.engines.engine_names import engine_of
from verify.report.findings import EngineReport, Failure, VerifyReport
from verify.report.intervals import bootstrap
from verify.report.measures import LossAdded, TextLoss
from verify.tolerances import loss_bar, loss_failures
from verify.work import Work


def gather(work: Work, report: VerifyReport) -> VerifyReport:
    """Add every engine's loss on text, and what was added to the base's."""
    return replace(report, engines=tuple(_with_loss(engine, work) for engine in report.engines))


def failures(report: VerifyReport) -> Iterator[Failure]:
    """Loss added where no clamp has fired yet, by engines that do the base's own arithmetic."""
    for engine in report.engines:
        if engine_of(engine.name).runs_the_base:
            yield from loss_failures(engine)


def _with_loss(engine: EngineReport, work: Work) -> EngineReport:
    import torch

    comparison = work.comparison
    now, base = (torch.tensor(comparison.losses[of].losses).double() for of in (engine.name, BASE))
    if not len(now):
        return engine
    forms = [form for form, n in comparison.windows for _ in range(n)]
    named = {name: torch.tensor([form == name for form in forms]) for name in dict.fromkeys(forms)}
    general = named.pop(TEXT)
    loss = float(now[general].mean())
    added = loss - float(base[general].mean())
    engine = replace(engine, loss=loss, loss_added=added)
    if engine.name == BASE:
        return engine
    before, after = base[general], now[general]
    flags = torch.tensor(comparison.after, dtype=torch.bool)[general]
    windows = [n for form, n in comparison.windows if form == TEXT]
    totals = [float(part.sum()) for part in torch.split(after - before, windows)]
    scale = len(windows) / len(before)  # windows of unequal length: per token again
    finite = all(math.isfinite(total) for total in totals)
    detail = LossAdded(
        split(before, after, flags),
        histogram(before, after),
        bootstrap([scale * total for total in totals]) if finite else None,
        loss_bar(comparison.sensitivities[REFERENCE].largest),
        tuple(
            TextLoss(name, int(here.sum()), float((now - base)[here].mean()))
            for name, here in named.items()
        ),
    )
    return replace(engine, loss_detail=detail)
