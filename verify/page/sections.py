"""What is on a report's page, in what order: a `VerifyReport` as the template is given it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from verify.attacks.attacks import ATTACKS
from verify.engines.engine_names import engine_of
from verify.evidence.kinds import other_lines
from verify.evidence.loads import Loaded, loaded
from verify.page.forgetting_plots import (
    LetterPlot,
    attack_plot,
    control_plots,
    known_plots,
    letter_plots,
    order_plots,
    subject_plots,
)
from verify.page.histograms import HistogramPlot, error_histograms, loss_histograms
from verify.page.plots import Plot, accuracy_plots, fired_plot, parity_plots
from verify.report.findings import CLAIMED, EngineReport, VerifyReport
from verify.report.measures import AnswerSet, Completion, HarnessScore
from verify.report.wording import (
    accuracy_text,
    answers_of,
    compared,
    guess_text,
    measured_engine,
    number,
    one_letter_lines,
    rounding_lines,
    title_of,
    was_attacked,
)

SHOWN_FLIPS = 40
"""Most flips of one engine in the page; report.json has all."""
SHOWN_PROMPTS = 8
"""Most prompts of one source, completions side by side."""
SHOWN_TOKENS = 35
"""Most tokens whose probability falls, and as many that rise."""
SHOWN_TASKS = 70
"""Most tasks of lm-evaluation-harness."""


@dataclass(frozen=True)
class Listed:
    """Flips of one engine, or prompts of one source, the first of them."""

    name: str
    """Of the engine, or the source."""
    title: str
    shown: tuple[Any, ...]
    """`Flip` each: a question that the engine answers otherwise than the reference; or
    `Completion`: what every variant went on with."""
    total: int


@dataclass(frozen=True)
class TaskRow:
    """One task of lm-evaluation-harness."""

    task: str
    n: int | None
    """Questions; None of a group of tasks."""
    scores: tuple[str, ...]
    """A text per engine."""
    guess: str
    """What guessing gives."""


@dataclass(frozen=True)
class Benchmarks:
    """Tasks of lm-evaluation-harness, engines side by side."""

    engines: tuple[EngineReport, ...]
    rows: tuple[TaskRow, ...]
    more: int
    """Tasks that are not shown."""


@dataclass(frozen=True)
class Page:
    """What the template is given. What is empty is not shown."""

    report: VerifyReport
    form: str
    """The prompt form that leads."""
    after: EngineReport | None
    """The engine whose figures stand for the folder."""
    why: str
    tiles: list[tuple[str, str, str]]
    measured: bool
    """Whether any engine was asked or compared."""
    parity: tuple[Plot, ...]
    rounding: list[tuple[str, str]]
    """Per engine that is held to it, how its distance compares with rounding."""
    errors: tuple[HistogramPlot, ...]
    accuracy: tuple[Plot, ...]
    known: tuple[Plot, ...]
    one_letter: tuple[str, ...]
    changed: list[EngineReport]
    """Engines of which it is said what they lost."""
    letters: tuple[LetterPlot, ...]
    calibrated: list[EngineReport]
    """Engines whose two kinds of letters were compared."""
    answered: list[tuple[EngineReport, AnswerSet]]
    orders: tuple[Plot, ...]
    subjects: tuple[Plot, ...]
    benchmarks: Benchmarks | None
    histograms: tuple[HistogramPlot, ...]
    controls: tuple[Plot, ...]
    prompts: list[Listed]
    most_tokens: int
    attacks: Plot | None
    fired: Plot | None
    flips: list[Listed]
    loads: list[Loaded]
    more: tuple[str, ...]
    """What kinds of evidence without a section of their own found."""
    provenance: tuple[tuple[str, str], ...]
    unmeasured: str
    """What is said at the end not to have been measured."""

    @property
    def sections(self) -> dict[str, Section]:
        """Those that there is anything in, in the order of the page."""
        return {name: section for name, section in SECTIONS.items() if section.has(self)}


@dataclass(frozen=True)
class Section:
    """A part of the page: the macro of its name in a template."""

    title: str
    template: str
    """The file beside this one that holds the macro: `report_TEMPLATE.j2`."""
    has: Callable[[Page], object]
    """What it shows; where that is nothing, it is left out."""


def _engines(page: Page) -> bool:
    return page.measured or any(e.parity or e.witnessed for e in page.report.engines)


SECTIONS: dict[str, Section] = {
    "engines": Section("Engines", "match", _engines),
    "knows": Section("What it knows", "forgetting", lambda page: page.accuracy or page.answered),
    "orders": Section("Known questions", "forgetting", lambda page: page.orders),
    "subjects": Section("Subject by subject", "forgetting", lambda page: page.subjects),
    "benchmarks": Section("lm-evaluation-harness", "forgetting", lambda page: page.benchmarks),
    "loss": Section(
        "Loss added to text",
        "forgetting",
        lambda page: any(engine.loss_detail for engine in page.report.engines),
    ),
    "controls": Section("Controls", "forgetting", lambda page: page.report.controls),
    "completions": Section("Completions", "attack", lambda page: page.report.completions),
    "robustness": Section("Under attack", "attack", lambda page: page.report.robustness),
    "loads": Section("As loaders take it", "match", lambda page: page.loads),
    "others": Section("More evidence", "match", lambda page: page.more),
    "fires": Section(
        "Where the clamp fires", "match", lambda page: page.fired or page.report.examples
    ),
    "flips": Section("Answers that differ from the hook's", "match", lambda page: page.flips),
    "provenance": Section("Provenance", "match", lambda page: page.provenance),
    "limits": Section("What this does not say", "match", lambda page: True),
}
"""The page's sections, in their order. To add one: an entry here, and its macro."""


def page_of(report: VerifyReport, provenance: tuple[tuple[str, str], ...] = ()) -> Page:
    """Everything that the page shows, lists bounded.

    Args:
        report: what was found.
        provenance: (name, text) of where the folder came from.
    """
    answered = [
        (e, a)
        for source in ("forget", "retain")
        for e in report.engines
        for a in e.answers
        if a.source == source
    ]
    return Page(
        report=report,
        form=report.prompt or "chat",
        after=measured_engine(report),
        why=_why(report),
        tiles=_tiles(report),
        measured=any(e.forget or e.parity or e.loss is not None for e in report.engines),
        parity=parity_plots(report),
        rounding=rounding_lines(report),
        errors=error_histograms(report),
        accuracy=accuracy_plots(report),
        known=known_plots(report),
        one_letter=one_letter_lines(report),
        changed=[
            engine
            for engine in report.engines
            if engine.alignment is not None
            or engine.unlearning_score is not None
            or any(answers.change for answers in engine.answers)
        ],
        letters=letter_plots(report),
        calibrated=[e for e in report.engines if any(a.calibration for a in e.answers)],
        answered=answered,
        orders=order_plots(report),
        subjects=subject_plots(report),
        benchmarks=_benchmarks(report),
        histograms=loss_histograms(report),
        controls=control_plots(report),
        prompts=_prompts(report),
        most_tokens=SHOWN_TOKENS,
        attacks=attack_plot(report),
        fired=fired_plot(report),
        flips=_flips(report),
        loads=loaded(report),
        more=other_lines(report, SECTIONS),
        provenance=provenance,
        unmeasured=_unmeasured(report),
    )


def _why(report: VerifyReport) -> str:
    """The verdict's reason, in a sentence."""
    if report.failures:
        n = len(report.failures)
        return f"{n} measurement{'s are' if n > 1 else ' is'} out of tolerance."
    if report.scope.removesuffix(CLAIMED) == "integrity":
        return "Every file is what the manifest says. Nothing was run."
    reference = report.engine("reference")
    parity = None if reference is None else reference.parity
    if reference is None:
        return "Files and witnesses are as they were at export; nothing was measured anew."
    engines = report.engines
    if not any(e.forget or e.loss is not None or e.witnessed or e.parity for e in engines):
        return "Nothing was measured that has a tolerance: that engines match was not checked."
    if parity is None:
        return "What was measured is within tolerance; logits were not compared."
    return (
        f"Every engine was compared with a hook around the whole SAE on {compared(parity)}, "
        f"and the clamp fired on {parity.tokens_fired:,} of those that were run. "
        "Each is within its tolerance."
    )


def _tiles(report: VerifyReport) -> list[tuple[str, str, str]]:
    """The few figures that lead: (name, figure, beneath it)."""
    form, base, after = report.prompt or "chat", report.engine("base"), measured_engine(report)
    if after is None:
        return []
    tiles = []
    for name, source in (("forget accuracy", "forget"), ("retained accuracy", "retain")):
        before, now = getattr(base, source, None), getattr(after, source)
        if before is not None and now is not None:
            change = f"{getattr(before, form):.3f} → {getattr(now, form):.3f}"
            tiles.append((name, change, f"before → after, {form} form"))
    answers = answers_of(after, "forget", form)
    if answers is not None and answers.known is not None and answers.known.n:
        known = answers.known
        beneath = f"to be forgotten, of {known.n} the base knows"
        tiles.append(("known questions", accuracy_text(known), beneath))
    if after.alignment is not None:
        tiles.append(("alignment", f"{after.alignment:.3f}", "forgot and kept, 0 to 1"))
    if after.unlearning_score is not None:
        tiles.append(("unlearning score", f"{after.unlearning_score:.3f}", "known questions"))
    if after.loss_added is not None:
        tiles.append(("loss added", f"{after.loss_added:+.4f}", "nats/token, on text"))
    attacks = () if report.robustness is None else report.robustness.attacks
    if measured := [
        (a.unlearned.accuracy, a.name) for a in attacks if a.unlearned and a.unlearned.n
    ]:
        accuracy, name = max(measured)
        tiles.append(("most under attack", f"{accuracy:.3f}", f"forget accuracy, {name}"))
    if after.parity is not None and engine_of(after.name).own:
        largest = number(after.parity.max_abs_logit)
        tiles.append(("max |Δlogit|", largest, f"{after.name} against the hook"))
        tiles.append(("tokens fired", f"{after.parity.tokens_fired:,}", "where the clamp acted"))
    return tiles


def _unmeasured(report: VerifyReport) -> str:
    """Ways back that were not tried."""
    untried = [
        way.tried_as
        for name, way in ATTACKS.items()
        if way.tried_as is not None and not was_attacked(report.robustness, name)
    ]
    *others, last = ["fine-tuning", *untried]
    return f"{', '.join(others)} or {last}" if others else last


def _prompts(report: VerifyReport) -> list[Listed]:
    if report.completions is None:
        return []
    by_source: dict[str, list[Completion]] = {}
    for prompt in report.completions.prompts:
        by_source.setdefault(prompt.source, []).append(prompt)
    titles = {"topic": "On the topic", "generic": "On anything else"}
    return [
        Listed(source, titles.get(source, source), tuple(of[:SHOWN_PROMPTS]), len(of))
        for source, of in by_source.items()
    ]


def _benchmarks(report: VerifyReport) -> Benchmarks | None:
    engines = tuple(engine for engine in report.engines if engine.harness)
    tasks = list(dict.fromkeys(score.task for engine in engines for score in engine.harness))
    if not tasks:
        return None
    scores = [{score.task: score for score in engine.harness} for engine in engines]
    rows = []
    for task in tasks[:SHOWN_TASKS]:
        first = next(of[task] for of in scores if task in of)
        guess = "–" if first.guess is None else guess_text(first.guess)
        rows.append(TaskRow(task, first.n, tuple(_score(of.get(task)) for of in scores), guess))
    return Benchmarks(engines, tuple(rows), len(tasks) - len(rows))


def _score(score: HarnessScore | None) -> str:
    if score is None:
        return "–"
    error = "" if score.stderr is None else f" ± {score.stderr:.3f}"
    return f"{score.accuracy:.3f}{error}"


def _flips(report: VerifyReport) -> list[Listed]:
    """Of every engine; the base's are what the unlearning changed, so they come last."""
    return [
        Listed(engine.name, title_of(engine), flips[:SHOWN_FLIPS], len(flips))
        for engine in sorted(report.engines, key=lambda engine: engine.name == "base")
        if engine.parity is not None and (flips := engine.parity.flips)
    ]
