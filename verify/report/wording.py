"""What figures say, in words: the same in the page, in the terminal and in the card."""

from __future__ import annotations

import math

from bake.questions.forms import FORMS, forms_beside
from bake.recipe import PromptForm
from bake.rounding import BAR
from verify.compare.loss_split import LossPart
from verify.engines.engine_names import engine_of
from verify.report.findings import EngineReport, Parity, Rounding, VerifyReport
from verify.report.intervals import McNemar
from verify.report.measures import (
    AnswerSet,
    Attack,
    Guess,
    KnownSet,
    Robustness,
    Share,
    TextShares,
)
from verify.tolerances import TYPICAL_BAR

SOURCES: dict[str, str] = {"forget": "to be forgotten", "retain": "to be kept"}
"""Sets of questions, and what is to happen to what they ask for."""
CONTROLS = {
    "reconstruction": "the SAE's own output with nothing edited, its error left out",
    "zero": "the same features set to 0",
    "random_decoder": "the same firing, written along other features' directions",
    "random_features": "the same edit, of other features that fire about as often",
}
"""What a control puts in the clamp's place."""
SMALLEST_P = 1e-99
"""Below it a p-value is only said to be below it."""


# --------------------------------------------------------------------------- who stands for what


def title_of(engine: EngineReport | str) -> str:
    """An engine's name for people."""
    name = engine if isinstance(engine, str) else engine.name
    return engine_of(name).title


def measured_engine(report: VerifyReport) -> EngineReport | None:
    """The engine whose figures stand for the folder: its own first one, else the reference."""
    own = [engine for engine in report.engines if engine_of(engine.name).own]
    return next(iter(own), report.engine("reference"))


def answers_of(engine: EngineReport, source: str, form: str | None) -> AnswerSet | None:
    """What an engine answered to a set of questions in a prompt form."""
    sets = (a for a in engine.answers if (a.source, a.form) == (source, form))
    return next(sets, None)


def share_of(
    report: VerifyReport, engine: EngineReport | None, source: str, form: str | None = None
) -> Share | None:
    """How many questions of a set an engine answers right, in the prompt form that leads or in
    another.
    """
    form = form or report.prompt or "chat"
    if engine is None:
        return None
    if (answers := answers_of(engine, source, form)) is not None:
        return answers.share
    accuracy = getattr(engine, source)
    n = 0 if report.items is None else int(getattr(report.items, f"{source}_questions"))
    return None if accuracy is None or not n else Share(round(getattr(accuracy, form) * n), n)


def shown_text(report: VerifyReport) -> str | None:
    """What all engines were shown; None where they were shown nothing side by side."""
    if (items := report.items) is None:
        return None
    shown = []
    if items.forget_questions or items.retain_questions:
        shown.append(
            f"{items.forget_questions:,} questions to be forgotten, {items.retain_questions:,} "
            f"to be kept, each in {forms_text(report)} form"
        )
    if items.text_tokens:
        shown.append(f"{items.text_tokens:,} tokens of text")
    return ", and ".join(shown) or None


def forms_text(report: VerifyReport) -> str:
    """The prompt forms that were measured."""
    *others, last = forms_beside(report.prompt)
    return f"{', '.join(others)} and {last}"


# --------------------------------------------------------------------------- shares


def percent(share: float) -> str:
    """A share, 0 to 1, in whole percent; what is not all or nothing never reads as if it were."""
    if 0 < share < 0.005:
        return "under 1 %"
    if 0.995 <= share < 1:
        return "over 99 %"
    return f"{100 * share:.0f} %"


def accuracy_text(share: Share | None) -> str:
    """An accuracy alone; "–" where nothing was asked."""
    return "–" if share is None or share.accuracy is None else f"{share.accuracy:.3f}"


def share_text(share: Share | None) -> str:
    """An accuracy with its 95 % Wilson interval; "–" where nothing was asked."""
    if share is None or share.interval is None:
        return "–"
    low, high = share.interval
    return f"{accuracy_text(share)} ({low:.2f} to {high:.2f})"


def text_shares_text(found: TextShares) -> str:
    """Accuracies by what the log-likelihood of a choice's text is divided by."""
    each = {"summed": found.summed, "per character": found.per_character}
    each |= {"per token": found.per_token}
    return ", ".join(f"{accuracy_text(share)} {name}" for name, share in each.items())


def known_how(form: PromptForm) -> str:
    """How the base has to answer a question to know it."""
    return "in all 24 orders of their choices" if FORMS[form].letters else f"in {form} form"


def known_text(known: KnownSet) -> str:
    """What became of the questions of a set that the base knows."""
    how = known_how(known.form).removesuffix(" of their choices")
    said = f"base {known.known} of {known.asked} {how}; {title_of(known.engine)} "
    said += f"{known.still_known.right} of those"
    if FORMS[known.form].letters:
        said += f", {accuracy_text(known.orders)} of their single orders"
    return said


def letters_text(letters: tuple[int, ...]) -> str:
    """How often each letter was said."""
    n = sum(letters)
    if not n:
        return "–"
    return ", ".join(
        f"{name} {percent(count / n)}" for name, count in zip("ABCD", letters, strict=False)
    )


# --------------------------------------------------------------------------- before and after


def change_text(change: McNemar) -> str:
    """What McNemar's test found."""
    p = change.p_value
    said = f"p < {SMALLEST_P:.0e}" if p < SMALLEST_P else f"p = {p:.2g}"
    return f"{change.lost} lost, {change.gained} gained, {said}"


def one_letter_text(engine: EngineReport) -> str | None:
    """That an engine says one letter whatever it is asked; None where it does not."""
    found = [a for a in engine.answers if a.only_letter is not None and any(a.letters)]
    if not found:
        return None
    letters = " or ".join(sorted({str(a.only_letter) for a in found}))
    least = min(max(a.letters) / sum(a.letters) for a in found)
    forms: dict[str, list[str]] = {}
    for a in found:
        forms.setdefault(SOURCES.get(a.source, a.source), []).append(a.form)
    asked = "; ".join(f"{source}, {' and '.join(of)} form" for source, of in forms.items())
    return (
        f"{title_of(engine)} says {letters} to {'at least ' if len(found) > 1 else ''}"
        f"{percent(least)} of the questions ({asked}): it has lost the format, not the facts"
    )


def one_letter_lines(report: VerifyReport) -> tuple[str, ...]:
    """The same of every engine that does."""
    lines = (one_letter_text(engine) for engine in report.engines)
    return tuple(line for line in lines if line is not None)


def nats(value: float | None) -> str:
    """A change of loss, signed; exactly 0 is "0"."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return "not finite"
    return "0" if value == 0 else f"{value:+.4f}" if abs(value) >= 5e-4 else f"{value:+.0e}"


def number(value: float | int | str | None) -> str:
    """A measure of any kind, short."""
    if value is None:
        return "–"
    if value == 0:
        return "0"
    if isinstance(value, float):
        if not math.isfinite(value):
            return "not finite"
        return f"{value:.3g}" if 0.01 <= abs(value) < 1000 else f"{value:.1e}"
    return str(value)


def loss_text(part: LossPart) -> str:
    """Loss added on a part of the tokens."""
    if not part.n_tokens:
        return "no tokens"
    return f"{nats(part.mean)} nats/token on {part.n_tokens:,} tokens"


# --------------------------------------------------------------------------- rounding


def rounding_lines(report: VerifyReport) -> list[tuple[str, str]]:
    """(engine, how its distance compares with rounding) of every engine that is held to that."""
    lines = []
    for engine in report.engines:
        parity = engine.parity
        if parity is None or parity.rounding is None or not engine_of(engine.name).held:
            continue
        lines.append((title_of(engine), rounding_text(parity.rounding)))
        if parity.float32 is not None:
            lines.append((f"{title_of(engine)} in float32", rounding_text(parity.float32)))
    return lines


def rounding_text(found: Rounding) -> str:
    """One engine's distance, in roundings, and what that says."""
    said = (
        f"worst token {number(found.worst)} of at most {BAR:g} roundings, {number(found.typical)} "
        f"of {TYPICAL_BAR:g} on average; one moves a logit by {number(found.sensitivity)}"
    )
    if found.smallest_fault is not None:
        said += f"; {fault_text(found.smallest_fault)} would have shown"
    if found.edge_tokens:
        said += (
            f"; {found.edge_tokens:,} of {found.edge_tokens + found.tokens:,} tokens, at a gate's "
            "edge or after one, are left out"
        )
    return said


def fault_text(share: float) -> str:
    """How large a fault is, against all that the clamp does."""
    return "no fault" if share >= 1 else f"a clamp {100 * share:.1g} % off"


# --------------------------------------------------------------------------- attacks


def measured_attacks(robustness: Robustness | None) -> list[tuple[Attack, Share]]:
    """The attacks that were measured, and what the unlearned model answered right."""
    return [
        (attack, attack.unlearned)
        for attack in (() if robustness is None else robustness.attacks)
        if attack.unlearned is not None and attack.unlearned.n
    ]


def was_attacked(robustness: Robustness | None, name: str) -> bool:
    """Whether an attack was measured; a name covers `NAME: ANYTHING` too."""
    return any(attack.name.split(":")[0] == name for attack, _share in measured_attacks(robustness))


def compared(parity: Parity) -> str:
    """On how many tokens engines were compared, and out of how many where it was not all."""
    of = "" if parity.of_tokens is None else f" of {parity.of_tokens:,}"
    return f"{parity.tokens_compared:,}{of} tokens"


def guess_text(guess: Guess) -> str:
    """What guessing gives, in words."""
    said = f"at random {guess.at_random:.3f}, the longest choice {guess.longest:.3f}"
    if guess.unasked is None:
        return said
    return f"{said}, the base without the question {guess.unasked:.3f}"
