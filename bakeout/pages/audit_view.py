"""What a person sees of an audit in the terminal."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table

from bakeout.terminal import console, printable, table_of
from verify.audit.audit_report import AuditReport
from verify.audit.audit_words import (
    lines_of_audit,
    relearned,
    scores_texts,
    sentences,
)
from verify.audit.levels import tried
from verify.audit.outcome import FolderAudit


def show_audit(report: AuditReport) -> None:
    """Print a table for each folder, and what it comes to in words."""
    screen = console()
    for folder, what in report.failures:
        screen.print(f"broken  {printable(folder)}: {printable(what)}", markup=False)
    if report.failures:
        screen.print("nothing was loaded or tried", markup=False)
    for audit in report.folders:
        said = f", carried as {audit.carrier}" if audit.carrier else ""
        screen.print(f"\n{printable(audit.folder)}{said}\n", markup=False)
        screen.print(_table(audit))
        for sentence in (*relearned(audit), *sentences(audit)):
            screen.print(f"\n{printable(sentence)}", markup=False)
    if report.folders:
        screen.print(f"\ntried: {tried(report.level)}", markup=False)


def _table(audit: FolderAudit) -> Table:
    form = audit.form
    table = table_of(
        "attack", "needs", "effort", f"forget\n{form}", f"retained\n{form}", "cloze", "open", left=2
    )
    models = [("base", audit.base), ("as it is", audit.before)]
    if audit.stripped is not None:
        models.append(("clamp taken out", audit.stripped))
    for name, scores in models:
        table.add_row(name, "", "", *scores_texts(scores, form))
    for line in lines_of_audit(audit):
        cells = (line.attack, line.needs, line.effort, line.right, line.retained)
        table.add_row(*(escape(printable(cell)) for cell in (*cells, line.cloze, line.open)))
    return table
