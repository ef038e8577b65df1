"""The report's histograms as numbers: how many tokens lie in each bin. The template draws them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from bake.errors import ReportError
from verify.compare.loss_split import EDGES
from verify.engines.engine_names import engine_of
from verify.page.plots import Ticks
from verify.report.findings import ERROR_EDGES, VerifyReport
from verify.report.wording import title_of

LOSS_LABELS = (-8.0, -2.0, -0.5, 0.0, 0.5, 2.0, 8.0)
"""Bounds of bins that are written under the loss: all of them do not fit on a phone."""
ERROR_LABELS = ERROR_EDGES[::2]


@dataclass(frozen=True)
class Bin:
    """One bar. Places and height are shares, 0 to 1."""

    start: float
    width: float
    height: float
    count: str
    """As few characters as fit over the bar; empty of no tokens."""
    said: str
    """The same in words."""
    tone: Literal["before", "after", "forget", "retain"]
    """before: left of the line; or whose tokens it counts."""


@dataclass(frozen=True)
class HistogramPlot:
    """How many tokens of one engine lie in each bin."""

    title: str
    bins: tuple[Bin, ...]
    ticks: Ticks
    line: float | None
    """Where an upright line stands."""
    note: str


def loss_histograms(report: VerifyReport) -> tuple[HistogramPlot, ...]:
    """Loss added per token, engine by engine; left of the line it fell."""
    plots = []
    for engine in report.engines:
        if engine.loss_detail is None or engine.name == "base":
            continue
        found = engine.loss_detail.histogram
        changed = sum(found.counts)
        n = changed + found.unchanged + found.not_finite
        note = f"{changed:,} of {n:,} tokens changed; {found.unchanged:,} did not, to the last bit"
        if found.not_finite:
            note += f"; {found.not_finite:,} became infinite or no number"
        labels = [(value, f"{value:g}") for value in LOSS_LABELS]
        name = title_of(engine)
        plots.append(_drawn(name, found.counts, EDGES, labels, f"{note}.", "nats", line=0.0))
    return tuple(plots)


def error_histograms(report: VerifyReport) -> tuple[HistogramPlot, ...]:
    """Tokens by their largest |Δlogit| from the hooked reference, engine by engine."""
    labels = [(value, f"1e{round(math.log10(value))}") for value in ERROR_LABELS]
    plots = []
    for engine in report.engines:
        reference = engine.name != "base" and not engine_of(engine.name).own
        if engine.parity is None or reference:
            continue
        errors = engine.parity.errors
        if n := sum(errors):
            note = f"{errors[0]:,} of {n:,} tokens are below {ERROR_EDGES[0]:g}."
            name = title_of(engine)
            plots.append(_drawn(name, errors, ERROR_EDGES, labels, note, "|Δlogit|"))
    return tuple(plots)


def _drawn(
    title: str,
    counts: Sequence[int],
    edges: Sequence[float],
    labels: Sequence[tuple[float, str]],
    note: str,
    unit: str,
    line: float | None = None,
) -> HistogramPlot:
    bounds = [f"below {edges[0]:g}"]
    bounds += [f"{low:g} to {high:g}" for low, high in pairwise(edges)]
    bounds.append(f"{edges[-1]:g} or more")
    if len(counts) != len(bounds):
        raise ReportError(
            f"report: the histogram of {title} in {unit} has {len(counts)} bins; expected "
            f"{len(bounds)}. Run `bakeout verify` again, and take its report"
        )
    most, width = max(1, *counts), 1 / len(counts)
    bins = tuple(
        Bin(
            start=i * width,
            width=width,
            height=count / most,
            count=_compact(count),
            said=f"{bounds[i]} {unit}: {count:,} tokens",
            tone="before" if line is not None and i <= edges.index(line) else "after",
        )
        for i, count in enumerate(counts)
    )
    place = {value: (i + 1) * width for i, value in enumerate(edges)}
    ticks = tuple((place[value], label) for value, label in labels)
    return HistogramPlot(title, bins, ticks, None if line is None else place[line], note)


def _compact(count: int) -> str:
    if count < 1000:
        return str(count) if count else ""
    if count < 9950:
        return f"{count / 1000:.1f}k"
    return f"{count / 1000:.0f}k" if count < 999_500 else f"{count / 1e6:.0f}M"
