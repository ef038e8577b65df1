"""A report's figures as a card shows them: sentences, and the hub's `model-index`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from huggingface_hub import EvalResult

from bake.recipe import QuestionSource, TextSource, Verify
from verify.intervals import wilson
from verify.report import EngineReport, VerifyReport

PROTOCOL = "https://arxiv.org/abs/2410.19278"
"""Where chat form and loss added are described: Farrell et al."""
QUESTIONS_FROM = "chat form of Farrell et al., plain form of lm-evaluation-harness"
"""How accuracies are measured. The hub's index has one source for all figures of a data set."""
Kind = Literal["forget", "retain"]


@dataclass(frozen=True)
class Figures:
    """What the text of a card takes from a report."""

    report: VerifyReport
    base: EngineReport | None
    after: EngineReport | None
    """The folder's own first engine; its reference where it has none."""
    rounded: tuple[EngineReport, ...]
    """Engines with rounded weights that answered questions."""

    @classmethod
    def of(cls, report: VerifyReport) -> Figures:
        """Pick the engines out."""
        return cls(
            report=report,
            base=report.engine("base"),
            after=measured_engine(report),
            rounded=tuple(
                e for e in report.engines if e.name.startswith("onnx-") and e.forget is not None
            ),
        )

    def accuracy(
        self, engine: EngineReport | None, kind: Kind, form: Literal["chat", "plain"]
    ) -> str | None:
        """An accuracy with its 95 % interval, as text; None where it was not measured."""
        found = None if engine is None else getattr(engine, kind)
        if found is None or self.report.items is None:
            return None
        share, n = getattr(found, form), getattr(self.report.items, f"{kind}_questions")
        low, high = wilson(round(share * n), n)
        return f"{share:.3f} ({low:.2f} to {high:.2f})"


def measured_engine(report: VerifyReport) -> EngineReport | None:
    """The engine whose figures stand for the folder."""
    own = [e for e in report.engines if e.name != "base" and not e.name.startswith("reference")]
    return next(iter(own), report.engine("reference"))


def eval_results(verify: Verify | None, report: VerifyReport | None) -> list[EvalResult]:
    """The `model-index` of a folder's front matter; empty where nothing was measured."""
    engine = None if report is None else measured_engine(report)
    if verify is None or engine is None:
        return []
    found = []
    kinds: tuple[tuple[Kind, QuestionSource, str], ...] = (
        ("forget", verify.forget_questions, "to be forgotten, lower is better"),
        ("retain", verify.retain_questions, "to be kept, higher is better"),
    )
    for kind, source, meaning in kinds:
        accuracy = getattr(engine, kind)
        for form in ("chat", "plain"):
            if accuracy is not None:
                name = f"accuracy, {form} form ({meaning})"
                value = getattr(accuracy, form)
                found.append(_result("multiple-choice", source, "accuracy", name, value))
    if engine.loss_added is not None and math.isfinite(engine.loss_added):
        name, value = "loss added (nats/token)", engine.loss_added
        found.append(_result("text-generation", verify.text, "loss_added", name, value))
    return found


def _result(
    task: str,
    source: QuestionSource | TextSource,
    metric: str,
    metric_name: str,
    value: float,
) -> EvalResult:
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
        source_name=QUESTIONS_FROM if metric == "accuracy" else "Farrell et al.",
        source_url=PROTOCOL,
    )


def one_line(text: str) -> str:
    """Text without line ends and control characters, for a value of the front matter."""
    return "".join(c for c in " ".join(text.split()) if c.isprintable())
