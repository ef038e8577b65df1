"""The report's plots as numbers: rows of marks on a common scale. The template draws them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from bake.rounding import BAR
from verify.engines.engine_names import engine_of
from verify.report.findings import EngineReport, VerifyReport
from verify.report.measures import Share
from verify.report.wording import SOURCES, accuracy_text, compared, share_of, title_of
from verify.tolerances import kl_bar

CHANCE = 0.25
"""Of four choices."""
Ticks = tuple[tuple[float, str], ...]
"""(place, label)."""
Tone = Literal["before", "after"]
SMALLEST = 1e-15
"""Left end of a log scale: where 0 and anything smaller is drawn."""


@dataclass(frozen=True)
class Mark:
    """A figure and its interval. Places are shares of the width, 0 to 1."""

    at: float
    low: float
    high: float


@dataclass(frozen=True)
class Row:
    """One line of a plot. Places are shares of its width, 0 to 1."""

    label: str
    value: str
    """The number, as text."""
    at: float
    """Where the mark stands; where a bar ends."""
    tone: Literal["before", "after", "bad"]
    low: float | None = None
    """Left end of the interval."""
    high: float | None = None
    """Right end of the interval."""
    bar: float | None = None
    """Where this row's limit stands."""
    before: Mark | None = None
    """The base's figure, hollow and above."""
    note: str = ""
    """A sentence beneath the row."""


@dataclass(frozen=True)
class Plot:
    """Rows above one axis."""

    title: str
    note: str
    """What is drawn, in a sentence."""
    rows: tuple[Row, ...]
    ticks: Ticks = ()
    line: float | None = None
    """Where one line crosses all rows."""
    filled: bool = False
    """Bars from the left end, in place of marks."""
    wide: bool = False
    """Takes the page's whole width."""


def share_row(label: str, share: Share, tone: Tone, beside: str = "") -> Row:
    """An accuracy with its 95 % interval."""
    low, high = share.interval or (0.0, 1.0)
    text = f"{accuracy_text(share)}  [{low:.2f}, {high:.2f}]{beside}"
    return Row(label, text, share.accuracy or 0.0, tone, low, high)


def tone_of(engine: EngineReport) -> Tone:
    """The base's is that of what was before."""
    return "before" if engine.name == "base" else "after"


SHARE_TICKS = tuple((i / 4, f"{i / 4:g}") for i in range(5))
"""Under an accuracy, 0 to 1."""


def accuracy_plots(report: VerifyReport) -> tuple[Plot, ...]:
    """Accuracy on what is to be forgotten and to be kept, every engine, with 95 % intervals."""
    if report.items is None:
        return ()
    form = report.prompt or "chat"
    sizes = {"forget": report.items.forget_questions, "retain": report.items.retain_questions}
    plots = []
    for source, n in sizes.items():
        rows = []
        for engine in report.engines:
            share = share_of(report, engine, source)
            if getattr(engine, source) is not None and share is not None and share.n:
                rows.append(share_row(title_of(engine), share, tone_of(engine)))
        if rows:
            note = (
                f"Share of {n} questions answered right, {form} form, with 95 % Wilson intervals. "
                f"The dashed line is chance, {CHANCE}."
            )
            title = SOURCES[source].capitalize()
            plots.append(Plot(title, note, tuple(rows), SHARE_TICKS, line=CHANCE))
    return tuple(plots)


def parity_plots(report: VerifyReport) -> tuple[Plot, ...]:
    """Distance of every engine from the hooked reference, and its limit where it has one."""
    compared = [
        (engine, engine.parity.rounding)
        for engine in report.engines
        if engine.parity is not None and engine.parity.rounding is not None
    ]
    if not compared:
        return ()
    worst = [(e, r.worst, BAR if engine_of(e.name).held else None) for e, r in compared]
    kl = [(e, r.mean_kl, kl_bar(r) if engine_of(e.name).held else None) for e, r in compared]
    apart = max((r.edge_tokens for e, r in compared if engine_of(e.name).held), default=0)
    note = f" {apart:,} tokens at a gate's edge, or after one, are left out." if apart else ""
    return (
        _log_plot(
            "Worst token, in roundings",
            "Largest difference of any logit, over what one rounding moves there",
            worst,
        ),
        _log_plot("Mean KL", "KL(reference ‖ engine), mean over tokens, in nats", kl, note),
    )


def _log_plot(
    title: str,
    note: str,
    measured: Iterable[tuple[EngineReport, float, float | None]],
    more: str = "",
) -> Plot:
    measured = list(measured)
    numbers = [x for _, value, limit in measured for x in (value, limit) if x is not None]
    positive = [max(x, SMALLEST) for x in numbers if math.isfinite(x)] or [1.0]
    first = math.floor(math.log10(min(positive)))
    last = max(first + 1, math.ceil(math.log10(max(positive))))

    def place(x: float) -> float:
        if not math.isfinite(x):
            return 1.0
        return min(1.0, max(0.0, (math.log10(max(x, SMALLEST)) - first) / (last - first)))

    rows = []
    for engine, value, limit in measured:
        within = limit is None or value <= limit
        tone: Literal["before", "after", "bad"] = (
            "before" if engine.name == "base" else "after" if within else "bad"
        )
        text = f"{value:.1e}" + ("" if limit is None else f"  limit {limit:.1e}")
        bar = None if limit is None else place(limit)
        rows.append(Row(title_of(engine), text, place(value), tone, bar=bar))
    step = max(1, math.ceil((last - first) / 4))
    ticks = tuple((place(10.0**e), f"1e{e}") for e in range(first, last + 1, step))
    limits = " The upright bar is the limit." if any(row.bar is not None for row in rows) else ""
    base = ""
    if any(engine.name == "base" for engine, _, _ in measured):
        base = " The base shows how far the clamp moves the model."
    return Plot(title, f"{note}, on a log scale.{base}{limits}{more}", tuple(rows), ticks)


def fired_plot(report: VerifyReport) -> Plot | None:
    """On how many tokens each layer's clamp fired."""
    if not report.fired_by_layer:
        return None
    most = max(1, *(n for _, n in report.fired_by_layer))
    reference = report.engine("reference")
    parity = None if reference is None else reference.parity
    of = "" if parity is None else f" {compared(parity)} were compared."
    return Plot(
        "Tokens on which the clamp fired",
        f"By layer, over every token that was run.{of} None is a failure, not a pass.",
        tuple(
            Row(f"layer {layer}", f"{n:,}", n / most, "after" if n else "bad")
            for layer, n in report.fired_by_layer
        ),
        filled=True,
    )
