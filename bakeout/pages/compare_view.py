"""Folders side by side, in the terminal and as a page: a row for each fact."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from bake.new_folder import write_whole
from bakeout.terminal import console, printable
from verify.audit.compared import Compared, Comparison, Figures
from verify.page.html import environment, shown
from verify.report.measures import Share
from verify.report.wording import accuracy_text, nats, number

UNMEASURED = "not measured"


def show_comparison(found: Comparison) -> None:
    """Print the table, and what is broken."""
    screen = console()
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("", "base", *(printable(folder.folder) for folder in found.folders)):
        table.add_column(escape(name), overflow="fold")
    for name, cells in rows_of(found):
        table.add_row(name, *(escape(printable(cell)) for cell in cells))
    screen.print(table)
    screen.print(f"\nall made from {printable(found.base)}", markup=False)
    for folder in found.folders:
        if folder.broken is not None:
            screen.print(
                f"broken  {printable(folder.folder)}: {printable(folder.broken)}", markup=False
            )


def write_comparison(found: Comparison, file: Path) -> None:
    """Write the table as one self-contained page.

    Raises:
        OutputError: it cannot be written.
    """
    made = environment("verify.page")
    made.filters["shown"] = shown
    page = made.get_template("compare.html.j2").render(
        found=found, rows=rows_of(found), unmeasured=UNMEASURED
    )
    write_whole(file, page, option=f"--html {file}")


def rows_of(found: Comparison) -> list[tuple[str, list[str]]]:
    """(fact, what it is of the base and of each folder)."""

    def row(name: str, base: str, of: Callable[[Compared], str | None]) -> tuple[str, list[str]]:
        return name, [base, *(of(folder) or UNMEASURED for folder in found.folders)]

    def measured(name: str, of: Callable[[Figures], str | None]) -> tuple[str, list[str]]:
        return row(name, of(found.before) or UNMEASURED, lambda folder: of(folder.figures))

    return [
        row("carrier", "", lambda of: of.carrier),
        row("computes the clamp", "", lambda of: of.claim),
        row("verified", "", lambda of: of.verdict),
        measured("forget accuracy", lambda of: _asked(of.forget, of.form)),
        measured("retained accuracy", lambda of: _asked(of.retain, of.form)),
        measured("loss added, nats/token", lambda of: _given(of.loss_added, nats)),
        measured("mean KL to the hook, nats", lambda of: _given(of.mean_kl, number)),
        row("forget, clamp taken out", "", lambda of: _asked(of.stripped, of.told_by)),
        row("worst attack", "", _worst),
        row("size on disk", "", lambda of: f"{of.size / 1e6:,.1f} MB"),
        measured("tokens/s", lambda of: _given(of.tokens_per_second, lambda rate: f"{rate:.0f}")),
        row("loading needs", "", lambda of: of.loads),
        row("comes off by", "", lambda of: of.removed),
        row("figures from", "", lambda of: ", ".join(of.reports)),
    ]


def _asked(share: Share | None, form: str | None) -> str | None:
    said = "" if form is None else f" {form}"
    return None if share is None else f"{accuracy_text(share)}{said}"


def _given(value: float | None, shown: Callable[[float], str]) -> str | None:
    return None if value is None else shown(value)


def _worst(folder: Compared) -> str | None:
    worst = folder.worst
    if worst is None:
        return None
    low, high = worst.interval
    right = f"{_asked(worst.right, folder.told_by)} ({low:.2f} to {high:.2f})"
    return f"{right} for whoever {worst.does} ({worst.level})"
