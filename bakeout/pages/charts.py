"""Where things stand in the pages' charts: data → coordinates, no markup."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bake.search.statistics import (
    BINS,
    BINS_PER_OCTAVE,
    LOWEST_BIN,
    FeatureStatistics,
    bin_edges,
)
from verify.page.histograms import Bin, HistogramPlot
from verify.page.plots import SHARE_TICKS, Ticks

WIDTH, HEIGHT = 640.0, 420.0
LEFT, RIGHT, TOP, BOTTOM = 64.0, 16.0, 16.0, 52.0
ZERO_GAP = 34.0
"""Between the axis, where shares of 0 stand, and the lowest decade."""
MOST_DOTS = 4000
"""Features that are not selected are thinned out beyond this."""
_EDGES = bin_edges().tolist()


@dataclass(frozen=True)
class Dot:
    """A mark in a scatter plot."""

    x: float
    y: float
    text: str
    """Shown on hover or tap."""
    kind: str
    """CSS class."""
    link: str | None = None


@dataclass(frozen=True)
class Scatter:
    """A scatter plot."""

    title: str
    x_label: str
    y_label: str
    x_ticks: Ticks
    """(place, label)."""
    y_ticks: Ticks
    dots: list[Dot]
    small: float = 2.4
    """Radius of a mark that is one of very many."""
    line: str = ""
    """Points of a polyline, `x,y x,y …`."""
    width: float = WIDTH
    height: float = HEIGHT
    left: float = LEFT
    right: float = WIDTH - RIGHT
    top: float = TOP
    bottom: float = HEIGHT - BOTTOM


def share_scatter(
    forget: FeatureStatistics, retain: FeatureStatistics, selected: Sequence[int]
) -> Scatter:
    """Forget share against retain share, both logarithmic, selected features marked."""
    chosen = set(selected)
    fires = np.flatnonzero((forget.fired > 0) | (retain.fired > 0))
    others = [int(f) for f in fires if int(f) not in chosen]
    step = max(1, math.ceil(len(others) / MOST_DOTS))
    lowest = math.floor(math.log10(1 / max(forget.n_tokens, retain.n_tokens)))
    shown = [*others[::step], *selected]
    dots = [
        Dot(
            x=_log_x(float(retain.share[f]), lowest),
            y=_log_y(float(forget.share[f]), lowest),
            text=f"feature {f}: forget {forget.share[f]:.5f}, retain {retain.share[f]:.5f}",
            kind="chosen" if f in chosen else "other",
            link=f"#f{f}" if f in chosen else None,
        )
        for f in shown
    ]
    decades = [10.0**d for d in range(lowest, 1)]
    thinned = "" if step == 1 else f", 1 in {step} of those not selected"
    return Scatter(
        title=f"{len(fires):,} features that fire{thinned}",
        x_label="share of retain tokens",
        y_label="share of forget tokens",
        x_ticks=tuple((_log_x(s, lowest), _share(s)) for s in (0.0, *decades)),
        y_ticks=tuple((_log_y(s, lowest), _share(s)) for s in (0.0, *decades)),
        dots=dots,
    )


def sweep_scatter(report: dict[str, Any]) -> Scatter:
    """Forget accuracy against retained accuracy of every point of a sweep, and the controls."""
    validation = report["validation"]
    form = report["prompt"]
    front = sorted(validation["front"], key=lambda point: (point["forget"], point["retain"]))
    marks = [(p["forget"], p["retain"], _settings(p), "other") for p in validation["points"]]
    marks += [(p["forget"], p["retain"], f"Pareto: {_settings(p)}", "chosen") for p in front]
    marks += [
        (c["forget"][form], c["retain"][form], f"control, {name}: {_settings(p)}", "control")
        for p in front
        for name, c in p["controls"].items()
    ]
    base = validation["base"]
    marks.append((base["forget"][form], base["retain"][form], "base", "base"))

    def x(accuracy: float) -> float:
        return LEFT + accuracy * (WIDTH - RIGHT - LEFT)

    def y(accuracy: float) -> float:
        return HEIGHT - BOTTOM - accuracy * (HEIGHT - BOTTOM - TOP)

    return Scatter(
        title=f"{len(validation['points'])} points on the validation questions ({form})",
        x_label="accuracy on forget questions",
        y_label="accuracy on retain questions",
        x_ticks=tuple((x(at), label) for at, label in SHARE_TICKS),
        y_ticks=tuple((y(at), label) for at, label in SHARE_TICKS),
        dots=[
            Dot(x(forget), y(retain), f"{text}: forget {forget:.3f}, retain {retain:.3f}", kind)
            for forget, retain, text, kind in marks
        ],
        small=3.5,
        line=" ".join(f"{x(p['forget']):.1f},{y(p['retain']):.1f}" for p in front),
    )


def activation_histogram(
    forget: FeatureStatistics, retain: FeatureStatistics, feature: int, trigger: float
) -> HistogramPlot:
    """How large a feature's activations are, as shares of the tokens of each corpus."""
    counts = {
        "forget": forget.histogram[feature] / forget.n_tokens,
        "retain": retain.histogram[feature] / retain.n_tokens,
    }
    used = [b for b in range(BINS) if any(count[b] for count in counts.values())]
    first, last = (used[0], used[-1]) if used else (0, BINS - 1)
    first, last = max(0, first - 2), min(BINS - 1, max(last + 1, first + 5))
    slot = 1 / (last - first + 1)
    most = max(1e-30, *(float(count.max()) for count in counts.values()))
    bins = tuple(
        Bin(
            start=(b - first) * slot + i * slot / 2,
            width=slot / 2,
            height=float(count[b]) / most,
            count="",
            said=f"{side}: {_EDGES[b]:.3g} to {_EDGES[b + 1]:.3g}, {float(count[b]):.2e} of tokens",
            tone="forget" if side == "forget" else "retain",
        )
        for i, (side, count) in enumerate(counts.items())
        for b in used
        if count[b]
    )
    at = (math.log2(trigger) - LOWEST_BIN) * BINS_PER_OCTAVE if trigger > 0 else first
    ticks = tuple(
        ((b - first) * slot, f"{_EDGES[b]:g}")
        for b in range(first, last + 1)
        if b % (2 * BINS_PER_OCTAVE) == 0
    )
    line = min(1.0, max(0.0, (at - first) * slot))
    return HistogramPlot(f"feature {feature}", bins, ticks, line, "")


def _log_x(share: float, lowest: int) -> float:
    if share <= 0:
        return LEFT
    span = WIDTH - RIGHT - LEFT - ZERO_GAP
    return LEFT + ZERO_GAP + span * (math.log10(share) - lowest) / -lowest


def _log_y(share: float, lowest: int) -> float:
    if share <= 0:
        return HEIGHT - BOTTOM
    span = HEIGHT - BOTTOM - TOP - ZERO_GAP
    return HEIGHT - BOTTOM - ZERO_GAP - span * (math.log10(share) - lowest) / -lowest


def _share(share: float) -> str:
    return f"{share:g}" if share in (0, 1) or share >= 0.01 else f"1e{round(math.log10(share))}"


def _settings(point: dict[str, Any]) -> str:
    pairs: Iterable[tuple[str, Any]] = point["settings"].items()
    return ", ".join(f"{name} {setting}" for name, setting in pairs)
