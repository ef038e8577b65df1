"""Witnesses: does an engine say what the exporter's said, and does the clamp act in it?

They need neither the base model nor the SAE: the folder brings a few prompts that fire the clamp,
and the logits that were seen at export, with the clamp and without it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from export.carriers.carriers import CARRIERS
from export.carriers.onnx.precisions import EXACT
from export.witness_file import WITNESSES, Witnesses
from verify.engines.engines import Engines
from verify.engines.runners import Runner
from verify.report.findings import EngineReport, VerifyReport, Witnessed
from verify.report.wording import number
from verify.tolerances import witness_bar, witness_failures

if TYPE_CHECKING:
    from torch import Tensor


def seen(witnesses: Witnesses, runner: Runner) -> Tensor:
    """What an engine says at the recorded places: [m, w]."""
    rows, columns = witnesses.places.unbind(-1)
    wanted = witnesses.attention_mask.new_zeros(witnesses.input_ids.shape).bool()
    wanted[rows, columns] = True
    order = (wanted.flatten().cumsum(0) - 1).view(wanted.shape)[rows, columns]
    logits = runner.logits(witnesses.input_ids, witnesses.attention_mask, wanted)
    return logits[order].gather(-1, witnesses.token_ids)


def load_witnesses(folder: Path) -> Witnesses | None:
    """A folder's witnesses, or None where it has none.

    Raises:
        FolderError: the file is damaged, or of another layout.
    """
    return Witnesses.load(folder) if (folder / WITNESSES).is_file() else None


def with_witnesses(report: VerifyReport, witnesses: Witnesses, engines: Engines) -> VerifyReport:
    """A report, and what every engine of the folder says to the witnesses, one after another, in
    float32.
    """
    found: dict[str, Witnessed] = {}
    if engines.torch is not None:
        engines.torch.load("float32", device=engines.device, threads=engines.threads)
        found[engines.torch.name] = _compare(witnesses, seen(witnesses, engines.torch))
    for graph in engines.graphs:
        with engines.open(graph) as runner:
            said = seen(witnesses, runner)
        if graph.name == EXACT or not CARRIERS[report.carrier].own_code:
            found[graph.name] = _compare(witnesses, said)
            continue
        with engines.open(graph, clamped=False) as runner:
            found[graph.name] = _compare(witnesses, said, seen(witnesses, runner))
    failures = [
        failure
        for name, measured in found.items()
        for failure in witness_failures(name, measured, report.carrier)
    ]
    return replace(
        report,
        engines=tuple(EngineReport(name, witnessed=of) for name, of in found.items()),
        failures=(*report.failures, *failures),
    )


def _compare(witnesses: Witnesses, said: Tensor, unclamped: Tensor | None = None) -> Witnessed:
    """Distance to what was seen at export, and the share of the clamp's effect that is shown:
    the engine's effect projected on the true one. Rounding moves both sides of an effect alike,
    so an engine with rounded weights is measured against itself without the clamp.
    """
    true = (witnesses.logits - witnesses.unclamped).double()
    effect = (said - (witnesses.unclamped if unclamped is None else unclamped)).double()
    return Witnessed(
        tokens=len(witnesses.places),
        max_abs_logit=float((said - witnesses.logits).abs().max().nan_to_num(float("inf"))),
        sensitivity=float(witnesses.sensitivity.max()),
        effect=float((effect * true).sum() / (true * true).sum()),
    )


def lines(report: VerifyReport) -> Iterator[str]:
    """What each engine says to the folder's own witnesses."""
    for engine in report.engines:
        if (seen := engine.witnessed) is None:
            continue
        bar = witness_bar(engine.name, seen, report.carrier)
        most = "" if bar is None else f" (rounding explains {number(bar)})"
        yield (
            f"witnesses  {engine.name}: {seen.tokens} tokens, max |Δlogit| "
            f"{seen.max_abs_logit:.1e}{most} to what was seen at export, {seen.effect:.0%} of the "
            "clamp's effect"
        )
