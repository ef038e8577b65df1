"""Loss added: what an engine's token losses on text are above the base's."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from verify.compare.comparison import BASE, REFERENCE
from verify.compare.loss_split import histogram, split
from verify.engines.engine_names import engine_of
from verify.report.findings import EngineReport, Failure, VerifyReport
from verify.report.intervals import bootstrap
from verify.report.measures import LossAdded
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
    now, base = comparison.losses[engine.name], comparison.losses[BASE]
    engine = replace(engine, loss=now.mean, loss_added=now.mean - base.mean)
    if engine.name == BASE or not now.losses:
        return engine
    before, after = torch.tensor(base.losses).double(), torch.tensor(now.losses).double()
    flags = torch.tensor(comparison.after, dtype=torch.bool)
    added = [float(part.sum()) for part in torch.split(after - before, comparison.windows)]
    scale = len(comparison.windows) / len(before)  # windows of unequal length: per token again
    finite = all(math.isfinite(total) for total in added)
    detail = LossAdded(
        split(before, after, flags),
        histogram(before, after),
        bootstrap([scale * total for total in added]) if finite else None,
        loss_bar(comparison.sensitivities[REFERENCE].largest),
    )
    return replace(engine, loss_detail=detail)
