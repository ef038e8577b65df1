"""The kinds of evidence: what each shows the engines, gathers, holds to a bar, and says.

To add one: an entry here, and a file beside this one that gathers it. What it finds goes into
`VerifyReport.more` under its name, unless it has a field of its own there. The terminal shows its
`lines`, and so do page and card where it has no field: `verify/page/sections.py` is for more.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from bake.errors import BakeoutError
from bake.recipe import Recipe
from verify.evidence import (
    choices,
    completions,
    controls,
    known,
    leak,
    loads,
    loss_added,
    parity,
    robustness,
    sae_fit,
    witnesses,
)
from verify.pace import Amounts
from verify.report import lines
from verify.report.findings import Failure, VerifyReport
from verify.work import Work


def _nothing(_: object) -> Iterable[str]:
    return ()


def _no_failures(_: VerifyReport) -> Iterable[Failure]:
    return ()


@dataclass(frozen=True)
class Kind:
    """One kind of evidence."""

    what: str
    """For README and the command line."""
    gather: Callable[[Work, VerifyReport], VerifyReport] | None = None
    """Adds what it finds to a report. None: `verify.run` finds it in the files, before the base is
    loaded."""
    shows: frozenset[str] = frozenset()
    """What it shows every engine, side by side: questions, texts."""
    with_base: bool = False
    """Whether the base is shown it too."""
    check: Callable[[Recipe], object] = _nothing
    """Reads the sources that only it reads, so that a bad row is known at once.

    Raises DataError."""
    failures: Callable[[VerifyReport], Iterable[Failure]] = _no_failures
    """What of a report is out of tolerance."""
    passes: Callable[[Amounts], float] | None = None
    """About how many token passes `gather` takes, which tells its progress under the kind's name;
    None: next to none."""
    lines: Callable[[VerifyReport], Iterable[str]] = _nothing
    """What it found, in words. Text from files is not yet made printable."""


KINDS: dict[str, Kind] = {
    "integrity": Kind("the sha256 of every file; weights, tokenizer and template are the base's"),
    "witnesses": Kind("prompts with the logits that were seen at export", lines=witnesses.lines),
    "fit": Kind(
        "how much of the variance of the base's activations each SAE explains, plain and per "
        "standardised dimension, and what those beside it would; its L0 and dead share",
        sae_fit.gather,
        failures=sae_fit.failures,
        passes=lambda of: float(sae_fit.TOKENS),
        lines=sae_fit.lines,
    ),
    "parity": Kind(
        "every engine against the hook: logits, KL, answers, decoding",
        parity.gather,
        frozenset({"questions", "texts"}),
        failures=parity.failures,
        lines=lines.rounding_said,
    ),
    "choices": Kind(
        'accuracy by set, prompt form (`prompt = "chat"`, `"plain"` or, for small models, '
        '`"cloze"`) and subject, McNemar\'s test against the base, alignment, how often each '
        "letter was said",
        choices.gather,
        frozenset({"questions"}),
        with_base=True,
        failures=choices.failures,
        lines=lines.changes_said,
    ),
    "loss": Kind(
        "loss added per token, before and from the first firing on, as a histogram",
        loss_added.gather,
        frozenset({"texts"}),
        with_base=True,
        failures=loss_added.failures,
        lines=lines.loss_said,
    ),
    "known": Kind(
        "the questions that the base answers right in all 24 orders of their choices (cloze: "
        "once), and what became of them; the unlearning score",
        known.gather,
        passes=lambda of: 24 * of.questions,
        lines=lines.known_said,
    ),
    "controls": Kind(
        "the bare reconstruction, ablation to zero, another decoder direction, and other features "
        "that fire as often, in the clamp's place",
        controls.gather,
        passes=lambda of: (1 + of.controls) * of.shown / 2,
        lines=lines.controls_said,
    ),
    "leak": Kind(
        "of a Gemma 4 with per-layer embeddings: how much of the clamp's push they take back",
        leak.gather,
        lines=leak.lines,
    ),
    "completions": Kind(
        "greedy continuations of base, reconstruction, unlearned and prompted model side by side, "
        "the tokens that fall and rise most, two-choice trivia",
        completions.gather,
        check=completions.check,
        passes=lambda of: (2 + of.engines + of.controls) * of.open_tokens,
        lines=lines.completions_said,
    ),
    "robustness": Kind(
        "the forget questions reworded, after solved examples, after irrelevant text, with a "
        "suffix searched by gradient (`--budget` steps), and in rounded engines",
        robustness.gather,
        check=robustness.check,
        passes=lambda of: 40 * of.questions,
        lines=lines.attacks_said,
    ),
    "loads": Kind(
        "the folder loaded in float32, bfloat16 and float16 and with 8- and 4-bit weights: how far "
        "from the hook, and from the base",
        loads.gather,
        failures=loads.failures,
        lines=loads.lines,
    ),
}
"""By the name that `--only` takes, in the order in which they are gathered and shown."""


class KindError(BakeoutError):
    """A kind of evidence that there is not."""


def of_files() -> frozenset[str]:
    """The kinds that need neither recipe nor base."""
    return frozenset(name for name, kind in KINDS.items() if kind.gather is None)


def shown_for(kinds: Iterable[str]) -> frozenset[str]:
    """What some kinds show every engine: questions, texts."""
    return frozenset().union(*(KINDS[name].shows for name in kinds))


def chosen_kinds(only: frozenset[str]) -> frozenset[str]:
    """The kinds that were asked for; all when none was.

    Raises:
        KindError: a name is not one of them.
    """
    for kind in sorted(only):
        if kind not in KINDS:
            close = difflib.get_close_matches(kind, KINDS, 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise KindError(
                f'no kind of evidence "{kind}"; expected one of {", ".join(KINDS)}{hint}'
            )
    return only or frozenset(KINDS)


def other_lines(report: VerifyReport, placed: Collection[str] = ()) -> tuple[str, ...]:
    """What kinds of evidence found that page and card have no place of their own for; the page's
    own are `placed`.
    """
    others = [name for name in report.more if name not in placed]
    return tuple(line for name in others for line in KINDS[name].lines(report))


def lines_of(report: VerifyReport) -> list[str]:
    """What was found, as a few lines for the terminal: nothing where there is nothing."""
    said = [line for kind in KINDS.values() for line in kind.lines(report)]
    return [*said, *lines.harness_said(report)]
