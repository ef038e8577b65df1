"""Parity: does every engine give the logits that the hooked reference gives?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from bake.questions.forms import forms_beside
from verify.engines.engine_names import engine_of
from verify.report.findings import EngineReport, Failure, VerifyReport
from verify.tolerances import parity_failures, silent_clamps
from verify.work import Work


def gather(work: Work, report: VerifyReport) -> VerifyReport:
    """Add how far every engine is from its reference."""
    return replace(report, engines=tuple(_compared(engine, work) for engine in report.engines))


def _compared(engine: EngineReport, work: Work) -> EngineReport:
    parity = work.comparison.parity_of(engine.name)
    if engine.name == work.unlearned.name:
        parity = replace(parity, float32=work.in_float32)
    return replace(engine, parity=parity)


def failures(report: VerifyReport) -> Iterator[Failure]:
    """Clamps that never fired, and what rounding does not explain."""
    yield from silent_clamps(report.fired_by_layer)
    items = report.items
    n_questions = 0 if items is None else items.forget_questions + items.retain_questions
    n_answers = len(forms_beside(report.prompt)) * n_questions
    for engine in report.engines:
        if engine.parity is not None and engine_of(engine.name).held:
            yield from parity_failures(engine.name, engine.parity, n_answers)
