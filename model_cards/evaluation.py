"""A report's figures as a card shows them: sentences, and the hub's `model-index`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from huggingface_hub import EvalResult

from bake.questions.forms import FORMS, forms_beside, known_in
from bake.recipe import PromptForm, Verify
from bake.sources import QuestionSource, TextSource
from verify.attacks.attacks import ATTACKS
from verify.engines.engine_names import engine_of
from verify.report.findings import EngineReport, VerifyReport
from verify.report.measures import Attack, HarnessScore
from verify.report.wording import (
    SOURCES,
    answers_of,
    change_text,
    known_how,
    known_text,
    measured_engine,
    nats,
    one_letter_lines,
    rounding_lines,
    share_of,
    share_text,
    text_shares_text,
)

PROTOCOL = "https://arxiv.org/abs/2410.19278"
"""Where chat form and loss added are described: Farrell et al."""
HARNESS = "https://github.com/EleutherAI/lm-evaluation-harness"
Kind = Literal["forget", "retain"]
WAYS = {name: way.does for name, way in ATTACKS.items() if name != "as asked"}
"""Attacks without training, and what somebody does."""
SHOWN_TASKS = 20
"""Most tasks of lm-evaluation-harness in a card's text; the index has all."""


@dataclass(frozen=True)
class Figures:
    """What the text of a card takes from a report."""

    report: VerifyReport
    base: EngineReport | None
    after: EngineReport | None
    """The folder's own first engine; its reference where it has none."""
    rounded: tuple[EngineReport, ...]
    """Engines with rounded weights that answered questions, and that no attack speaks of."""
    attacks: tuple[Attack, ...]
    """Of which the report says something."""
    rounding: list[tuple[str, str]]
    """Per engine that is held to it, how its distance compares with rounding."""
    one_letter: tuple[str, ...]

    @classmethod
    def from_report(cls, report: VerifyReport) -> Figures:
        """Pick the engines out."""
        attacks = () if report.robustness is None else report.robustness.attacks
        attacks = tuple(attack for attack in attacks if attack.name != "as asked")
        names = {attack.name for attack in attacks}
        return cls(
            report=report,
            base=report.engine("base"),
            after=measured_engine(report),
            rounded=tuple(
                e
                for e in report.engines
                if engine_of(e.name).rounding is not None
                and e.forget is not None
                and f"weights: {e.name}" not in names
            ),
            attacks=attacks,
            rounding=rounding_lines(report),
            one_letter=one_letter_lines(report),
        )

    @property
    def form(self) -> PromptForm:
        """The prompt form that leads."""
        return self.report.prompt or "chat"

    @property
    def forms(self) -> tuple[PromptForm, ...]:
        """Those that were measured."""
        return forms_beside(self.form)

    @property
    def by_text(self) -> bool:
        """Whether the form that leads takes choices' own texts for answers."""
        return not FORMS[self.form].letters

    @property
    def known_how(self) -> str:
        """How the base has to answer a question to know it."""
        return known_how(known_in(self.form))

    def accuracy(self, engine: EngineReport | None, kind: Kind, form: PromptForm) -> str | None:
        """An accuracy with its 95 % interval, as text; None where it was not measured."""
        share = share_of(self.report, engine, kind, form)
        return None if share is None or not share.n else share_text(share)

    @property
    def untried(self) -> list[str]:
        """Attacks of which the report says nothing."""
        kinds = {attack.name.split(":")[0] for attack in self.attacks}
        kinds |= {"weights"} if self.rounded else set()
        return [way for kind, way in WAYS.items() if kind not in kinds]

    def findings(self) -> list[tuple[str, str]]:
        """What else was found of the forgetting: (what, figure)."""
        rows = []
        for known in self.report.known:
            what = f"known questions {SOURCES.get(known.source, known.source)}"
            rows.append((what, known_text(known)))
        if self.after is None:
            return rows
        form = self.form
        for source, meaning in SOURCES.items():
            answers = answers_of(self.after, source, form)
            if answers is not None and answers.known is not None and answers.known.n:
                what = f"accuracy on known questions {meaning}, {form} form"
                rows.append((what, share_text(answers.known)))
            if answers is not None and answers.change is not None:
                what = f"questions {meaning} against the base, {form} form (McNemar's test)"
                rows.append((what, change_text(answers.change)))
            if answers is not None and answers.by_text is not None:
                what = f"accuracy {meaning}, {form} form, by the length that divides"
                rows.append((what, text_shares_text(answers.by_text)))
        for name, value in (
            ("alignment, 0 to 1", self.after.alignment),
            ("unlearning score, 0 to 1", self.after.unlearning_score),
        ):
            if value is not None:
                rows.append((name, f"{value:.3f}"))
        return rows

    def tasks(self) -> list[tuple[str, str | None, str]]:
        """Tasks of lm-evaluation-harness: (task, the base's accuracy, the folder's)."""
        if self.after is None:
            return []
        base = () if self.base is None else self.base.harness
        before = {score.task: f"{score.accuracy:.3f}" for score in base}
        return [(s.task, before.get(s.task), f"{s.accuracy:.3f}") for s in self.after.harness]

    def side_effects(self) -> list[tuple[str, str | None, str | None]]:
        """What changed besides accuracy and mean loss: (what, before, after); None: no figure."""
        found: list[tuple[str, str | None, str | None]] = []
        form = self.form
        before, after = (self._known_retained(engine, form) for engine in (self.base, self.after))
        if before or after:
            found.append((f"accuracy on known questions to be kept, {form} form", before, after))
        if self.after is not None and self.after.loss_detail is not None:
            split = self.after.loss_detail.split
            added = "loss added to text {}, nats/token"
            found.append((added.format("before any firing"), "0", nats(split.before.mean)))
            found.append((added.format("from the first firing on"), "0", nats(split.after.mean)))
        tallies = () if self.report.completions is None else self.report.completions.tallies
        for tally in tallies:
            if (tally.source, tally.variant) == ("generic", "unlearned"):
                same = tally.as_base
                what = "generic prompts continued as the base does"
                found.append((what, str(same.n), str(same.right)))
        return found

    def _known_retained(self, engine: EngineReport | None, form: str) -> str | None:
        answers = None if engine is None else answers_of(engine, "retain", form)
        known = None if answers is None else answers.known
        return None if known is None else share_text(known)


def eval_results(verify: Verify | None, report: VerifyReport | None) -> list[EvalResult]:
    """The `model-index` of a folder's front matter; empty where nothing was measured."""
    engine = None if report is None else measured_engine(report)
    if verify is None or engine is None:
        return []
    results = []
    forms = forms_beside(None if report is None else report.prompt)
    kinds: tuple[tuple[Kind, QuestionSource, str], ...] = (
        ("forget", verify.forget_questions, "to be forgotten, lower is better"),
        ("retain", verify.retain_questions, "to be kept, higher is better"),
    )
    for kind, source, meaning in kinds:
        accuracy = getattr(engine, kind)
        for form, value in ({} if accuracy is None else accuracy.measured).items():
            name = f"accuracy, {form} form ({meaning})"
            results.append(_result("multiple-choice", source, "accuracy", name, value, forms))
        for form in forms:
            answers = answers_of(engine, kind, form)
            known = None if answers is None else answers.known
            if known is not None and known.accuracy is not None:
                name = f"accuracy on known questions, {form} form ({meaning})"
                value = known.accuracy
                results.append(_result("multiple-choice", source, "accuracy", name, value, forms))
    if engine.loss_added is not None and math.isfinite(engine.loss_added):
        name, value = "loss added (nats/token)", engine.loss_added
        results.append(_result("text-generation", verify.text, "loss_added", name, value))
    for score in engine.harness:
        if math.isfinite(score.accuracy):
            results.append(_task_result(score))
    return results


def _task_result(score: HarnessScore) -> EvalResult:
    task = one_line(score.task)
    return EvalResult(
        task_type="multiple-choice",
        dataset_type=task,
        dataset_name=f"{task} (lm-evaluation-harness)",
        metric_type="accuracy",
        metric_name="accuracy, as lm-evaluation-harness scores it",
        metric_value=score.accuracy,
        source_name="lm-evaluation-harness",
        source_url=HARNESS,
    )


def _result(
    task: str,
    source: QuestionSource | TextSource,
    metric: str,
    metric_name: str,
    value: float,
    forms: Sequence[PromptForm] = (),
) -> EvalResult:
    """One figure; the hub's index has one source for all figures of a data set."""
    asked = ", ".join(f"{form} form of {FORMS[form].source}" for form in forms)
    hub = source.dataset is not None
    name = one_line(source.dataset or source.path or "")
    return EvalResult(
        task_type=task,
        dataset_type=name,
        dataset_name=f"{name} ({source.config})" if source.config else name,
        dataset_config=source.config,
        dataset_split=source.split if hub else None,
        metric_type=metric,
        metric_name=metric_name,
        metric_value=value,
        source_name=asked or "Farrell et al.",
        source_url=PROTOCOL,
    )


def one_line(text: str) -> str:
    """Text without line ends and control characters, for a value of the front matter."""
    return "".join(c for c in " ".join(text.split()) if c.isprintable())
