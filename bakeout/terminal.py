"""What a person sees in the terminal: progress, tables, folders."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from bake.errors import short
from bake.new_folder import write_whole
from export.carriers.carriers import CARRIERS, claim_of
from export.code_check import check_code
from export.manifest import ClampEntry, CompiledEntry, DistilledEntry, Manifest
from export.passing_by import said
from verify.evidence.kinds import lines_of
from verify.report.findings import CLAIMED, EngineReport, VerifyReport
from verify.report.measures import Completion, Completions, Continuation
from verify.report.wording import number, title_of


def console() -> Console:
    """Standard output; wide enough for the tables when it is no terminal."""
    return Console(width=None if sys.stdout.isatty() else 120, highlight=False)


def table_of(*columns: str, left: int = 1) -> Table:
    """An empty table; the first columns stand at the left, figures at the right."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for place, name in enumerate(columns):
        table.add_column(name, justify="left" if place < left else "right")
    return table


@contextlib.contextmanager
def progress(title: str) -> Iterator[Callable[[str, float], None]]:
    """Yield `advance(what, share done)`: a bar on stderr, nothing where that is no terminal."""
    if not sys.stderr.isatty():
        yield lambda _what, _share: None
        return
    columns = (
        TextColumn(title),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("left "),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=1.0)

        def advance(what: str, share: float) -> None:
            # A task that is complete stops its clock, and the next stage begins at 0 again.
            bar.update(task, description=escape(what), completed=min(share, 0.999))

        yield advance


def write_json(report: dict[str, Any], file: Path) -> None:
    """Write a report as JSON to a file, or to stdout where the file is `-`."""
    text = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
    if str(file) == "-":
        sys.stdout.write(text)
        return
    write_whole(file, text, option=f"--json {file}")


def show_report(report: VerifyReport) -> None:
    """Print the engines table, failures, flips and the verdict."""
    out = console()
    if any(engine.parity or engine.forget or engine.loss is not None for engine in report.engines):
        out.print(engines_table(report))
    for line in lines_of(report):
        out.print(escape(printable(line).replace("\n", " ")))
    for warning in report.warnings:
        out.print(f"warning: {escape(printable(warning))}")
    for failure in report.failures:
        out.print(f"[red]fail[/red]  {escape(printable(str(failure)))}")
    for line in flip_lines(report):
        out.print(escape(printable(line)))
    if report.carrier in CARRIERS:
        out.print(f"the clamp is lost by {escape(CARRIERS[report.carrier].lost_by)}")
    if report.signed_by is not None:
        out.print(f"signed by {escape(printable(report.signed_by))}")
    if report.cannot_know is not None:
        style = "red" if report.scope.endswith(CLAIMED) else "yellow"
        out.print(f"[{style}]{escape(report.cannot_know)}[/{style}]")
    colour = "green" if report.verdict == "pass" else "red"
    exact = claim_of(report.carrier, exact=report.exact)
    out.print(
        f"[{colour}]{report.verdict}[/{colour}]  "
        + escape(printable(f"{report.folder}: {report.carrier}, {exact}; scope {report.scope}"))
    )


SIDE_BY_SIDE = 6
"""How many prompts are shown with their continuations."""


def show_forgetting(report: VerifyReport, speeds: Mapping[str, float]) -> None:
    """What every engine still says, what it costs, how fast it is; then a few prompts.

    Args:
        report: with completions.
        speeds: tokens per second that each engine goes on with, by its name.
    """
    out, completions = console(), report.completions
    assert completions is not None
    tallies = {(of.source, of.variant): of.right for of in completions.tallies}
    engines = {own.engine: own for own in completions.engines}
    texts = next((e.loss_detail.texts for e in report.engines if e.loss_detail is not None), ())
    table = table_of(
        "",
        *("right\non topic", "right on\nothers", "loss added\ngeneral"),
        *(f"loss added\n{escape(printable(text.name))}" for text in texts),
        *("mean KL\nto the hook", "tokens\nfired", "tokens/s"),
    )
    for engine in (of for of in report.engines if of.name == "base" or of.name in engines):
        own = engines.get(engine.name)
        right = (own.topic, own.generic) if own is not None else (None, None)
        if engine.name == "base":
            right = (tallies.get(("topic", "base")), tallies.get(("generic", "base")))
        detail, parity = engine.loss_detail, engine.parity
        table.add_row(
            escape(printable(title_of(engine))),
            *("–" if of is None else f"{of.right} of {of.n}" for of in right),
            "–" if engine.loss_added is None else f"{engine.loss_added:+.4f}",
            *(("–",) * len(texts) if detail is None else (f"{t.added:+.4f}" for t in detail.texts)),
            "–" if parity is None else f"{parity.mean_kl:.1e}",
            "–" if parity is None else f"{parity.tokens_fired:,}",
            f"{speeds[engine.name]:.0f}" if engine.name in speeds else "–",
        )
    for control in report.controls:
        own = engines.get(control.name)
        right = (own.topic, own.generic) if own is not None else (None, None)
        added = "–" if control.loss_added is None else f"{control.loss_added:+.4f}"
        table.add_row(
            f"control: {control.name}",
            *("–" if of is None else f"{of.right} of {of.n}" for of in right),
            *(added, *(["–"] * (len(texts) + 3))),
        )
    out.print()
    out.print(table)
    for prompt in _telling(completions):
        out.print(f"\n{escape(printable(prompt.prompt))} …", style="bold")
        for one in prompt.continuations:
            if one.variant in ("base", "unlearned"):
                said = " ".join(one.text.split())
                out.print(f"  {one.variant:<10} {escape(printable(said))}")


def _telling(completions: Completions) -> list[Completion]:
    """Prompts that show most: what the base knew, on the topic what changed first; and others."""

    def said(prompt: Completion) -> dict[str, Continuation]:
        return {one.variant: one for one in prompt.continuations}

    topic = [p for p in completions.prompts if p.source == "topic" and said(p)["base"].right]
    topic.sort(key=lambda prompt: bool(said(prompt)["unlearned"].right))
    others = [p for p in completions.prompts if p.source != "topic" and said(p)["base"].right]
    n = SIDE_BY_SIDE - min(2, len(others))
    return [*topic[:n], *others[: SIDE_BY_SIDE - n]]


def engines_table(report: VerifyReport) -> Table:
    """One row per engine: what it knows, what it lost, and how far it is from the reference."""
    form = report.prompt or "chat"
    table = table_of(
        "",
        f"forget accuracy\n{form}",
        f"retained accuracy\n{form}",
        "loss added\nnats/token",
        "max |Δlogit|\nto the hook",
        "roundings\nworst token",
        "mean KL\nnats",
        "answer\nflips",
        "tokens\nfired",
    )
    for engine in report.engines:
        table.add_row(*_engine_row(engine, form))
    return table


def _engine_row(engine: EngineReport, form: str) -> list[str]:
    def accuracy(of: Any) -> str:
        return "–" if of is None else f"{getattr(of, form):.3f}"

    row = [escape(printable(title_of(engine))), accuracy(engine.forget)]
    row += [accuracy(engine.retain)]
    row += ["–" if engine.loss_added is None else f"{engine.loss_added:+.4f}"]
    if (parity := engine.parity) is None:
        return [*row, *("–",) * 5]
    return [
        *row,
        f"{parity.max_abs_logit:.1e}",
        "–" if parity.rounding is None else number(parity.rounding.worst),
        f"{parity.mean_kl:.1e}",
        str(len(parity.flips)),
        str(parity.tokens_fired),
    ]


def flip_lines(report: VerifyReport, most: int = 10) -> list[str]:
    """Questions that an engine answers otherwise than the reference; not the base's."""
    lines = [
        f"flip  {engine.name}: {flip.source} row {flip.row} ({flip.form}): "
        f"{flip.engine} for {flip.reference}, right is {flip.right}: {flip.question}"
        for engine in report.engines
        if engine.parity is not None and engine.name != "base"
        for flip in engine.parity.flips
    ]
    more = [f"… and {len(lines) - most} more flips"] if len(lines) > most else []
    return lines[:most] + more


def show_folder(folder: Path) -> None:
    """Print what a folder says it is. Nothing in it is run or checked but its code."""
    manifest = Manifest.read(folder)
    check_code(folder, manifest)
    carrier = CARRIERS.get(manifest.carrier)
    rows = [
        ("carrier", f"{manifest.carrier}, {claim_of(manifest.carrier, exact=manifest.exact)}"),
        ("base", manifest.base.title),
        *((f"clamp, layer {clamp.layer}", _clamp_text(clamp)) for clamp in manifest.clamps),
        *(
            ("goes past it", line)
            for clamp in manifest.clamps
            for line in said(
                clamp.layer, clamp.old_keys, clamp.embedded_again, clamp.parameters.get("tau")
            )
        ),
        *compiled_lines(manifest.compiled),
        *distilled_lines(manifest.distilled),
        *([("lost by", carrier.lost_by)] if carrier is not None else []),
        ("recipe sha256", manifest.recipe_sha256),
        ("made with", ", ".join(f"{name} {v}" for name, v in manifest.tools.items())),
        ("files", f"{len(manifest.files)}, checked by `bakeout verify`, not by this"),
    ]
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in rows:
        table.add_row(name, escape(printable(text)))
    console().print(table)


def compiled_lines(compiled: CompiledEntry | None) -> list[tuple[str, str]]:
    """What a compiled folder's manifest says about its layers; nothing for other folders."""
    if compiled is None:
        return []
    narrow, wide = compiled.hidden_size
    lines = [("compiled", f"hidden size {narrow} to {wide}, {compiled.dtype}")]
    if compiled.loads:
        said = (f"{name} {word}" for name, word in compiled.loads.items())
        lines.append(("loaded as", ", ".join(said)))
    for site in compiled.sites:
        distance = site.distance
        lines.append(
            (
                "layers " + " and ".join(str(layer) for layer in site.layers),
                f"{site.flags} flags, {max(site.neurons)} neurons; off by {distance.median:.1e} of "
                f"the residual stream (median; at most {distance.largest_share_of_bound:.2g} of "
                f"the bound) on {distance.tokens} random tokens",
            )
        )
    if compiled.idle:
        numbers = ", ".join(map(str, compiled.idle))
        lines.append(("idle", f"layers {numbers} do nothing, for runtimes that count layers"))
    return lines


def distilled_lines(distilled: DistilledEntry | None) -> list[tuple[str, str]]:
    """What a trained folder's manifest says about its training; nothing for other folders."""
    if distilled is None:
        return []
    found = distilled.held_out
    settings = ", ".join(f"{key} {short(str(value))}" for key, value in distilled.settings.items())
    return [
        ("trained", f"seed {distilled.seed}; {settings}"),
        (
            "held out",
            f"{found.retain_kl:.4f} nats per token from the base on retain text "
            f"({found.retain_tokens:,} tokens), {found.forget_kl:.4f} from "
            f"{short(distilled.teacher)} on forget text ({found.forget_tokens:,})",
        ),
    ]


def _clamp_text(clamp: ClampEntry) -> str:
    features = ", ".join(str(feature) for feature in clamp.features)
    parameters = ", ".join(f"{k} {short(str(v))}" for k, v in clamp.parameters.items())
    word = ", by the recipe's word alone" if clamp.hook_point_from == "recipe" else ""
    return (
        f"{clamp.method} at {clamp.hook_point}{word} ({parameters})\n"
        f"features {features}\n"
        f"of {clamp.sae.name} ({clamp.sae.architecture}, sha256 {clamp.sae.sha256[:16]}…)"
        f"{'' if clamp.fit is None else f', {clamp.fit.as_told}'}"
    )


def printable(text: str) -> str:
    """Text from a file as it may be shown: no control characters but line ends."""
    return "".join(c if c.isprintable() or c == "\n" else "�" for c in text)
