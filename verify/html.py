"""`VerifyReport` → one self-contained HTML page: no script, nothing loaded from elsewhere."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from export.new_folder import MANIFEST
from verify.integrity import read_manifest
from verify.plots import accuracy_plots, fired_plot, parity_plots, title_of
from verify.report import Flip, VerifyReport

SHOWN_FLIPS = 40
"""Most flips of one engine in the page; report.json has all."""


@dataclass(frozen=True)
class Flips:
    """Questions that one engine answers otherwise than the reference."""

    engine: str
    title: str
    shown: tuple[Flip, ...]
    total: int


def render_html(report: VerifyReport, provenance: tuple[tuple[str, str], ...] = ()) -> str:
    """The page.

    Args:
        report: what was found. Sections without data are left out.
        provenance: (name, text), as `provenance` reads them from the folder.
    """
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"shown": shown, "token": _token, "number": _number, "pct": _percent}
    template = environment.from_string(
        files("verify").joinpath("report.html.j2").read_text(encoding="utf-8")
    )
    return template.render(
        report=report,
        why=_why(report),
        tiles=_tiles(report),
        accuracy=accuracy_plots(report),
        parity=parity_plots(report),
        fired=fired_plot(report),
        flips=_flips(report),
        title_of=title_of,
        provenance=provenance,
    )


def write_html(report: VerifyReport, folder: Path, file: Path) -> None:
    """Write the page of a folder's report."""
    file.write_text(render_html(report, provenance(folder)), encoding="utf-8")


def provenance(folder: Path) -> tuple[tuple[str, str], ...]:
    """What a folder's manifest says of where it came from: (name, text)."""
    manifest = read_manifest(folder)
    found: dict[str, Any] = json.loads((folder / MANIFEST).read_bytes())
    base = found.get("base") or {}
    rows = [("base", " at ".join(str(part) for part in base.values() if part))]
    for clamp in found.get("clamps") or []:
        sae = clamp.get("sae") or {}
        settings = ", ".join(f"{k} {v}" for k, v in (clamp.get("parameters") or {}).items())
        features = ", ".join(map(str, clamp.get("features") or []))
        rows.append(
            (
                f"clamp, layer {clamp.get('layer')}",
                f"{clamp.get('method')} at {clamp.get('hook_point')} ({settings}); "
                f"features {features}; SAE {sae.get('name')} ({sae.get('architecture')}, sha256 "
                f"{sae.get('sha256')})",
            )
        )
    rows.append(("recipe sha256", str(found.get("recipe_sha256"))))
    rows += [(f"source {name}", f"sha256 {h}") for name, h in (found.get("sources") or {}).items()]
    tools = found.get("tools") or {}
    rows.append(("made with", ", ".join(f"{name} {version}" for name, version in tools.items())))
    rows.append(("manifest sha256", f"{manifest.sha256}, listing {len(manifest.files)} files"))
    return tuple(rows)


# --------------------------------------------------------------------------- sentences and figures


def _why(report: VerifyReport) -> str:
    """The verdict's reason, in a sentence."""
    if report.failures:
        n = len(report.failures)
        return f"{n} measurement{'s are' if n > 1 else ' is'} out of tolerance."
    if report.scope == "integrity":
        return "Every file is what the manifest says. Nothing was run."
    reference = report.engine("reference")
    parity = None if reference is None else reference.parity
    if reference is None:
        return "Files and witnesses are as they were at export; nothing was measured anew."
    if parity is None:
        return "What was measured is within tolerance; logits were not compared."
    return (
        f"Every engine was compared with a hook around the whole SAE on {parity.tokens_compared:,} "
        f"tokens, and the clamp fired on {parity.tokens_fired:,} of those that were run. "
        "Each is within its tolerance."
    )


def _tiles(report: VerifyReport) -> list[tuple[str, str, str]]:
    """The few figures that lead: (name, figure, beneath it)."""
    form = report.prompt or "chat"
    base = report.engine("base")
    after = report.engine("checkpoint") or report.engine("reference")
    tiles = []
    if base is not None and after is not None:
        for name, source in (("forget accuracy", "forget"), ("retained accuracy", "retain")):
            before, now = getattr(base, source), getattr(after, source)
            if before is not None and now is not None:
                change = f"{getattr(before, form):.3f} → {getattr(now, form):.3f}"
                tiles.append((name, change, f"before → after, {form} form"))
    if after is not None and after.loss_added is not None:
        tiles.append(("loss added", f"{after.loss_added:+.4f}", "nats/token, on text"))
    if after is not None and after.parity is not None and after.name == "checkpoint":
        largest = _number(after.parity.max_abs_logit)
        tiles.append(("max |Δlogit|", largest, "checkpoint against the hook"))
        tiles.append(("tokens fired", f"{after.parity.tokens_fired:,}", "where the clamp acted"))
    return tiles


def _flips(report: VerifyReport) -> list[Flips]:
    """Of every engine; the base's are what the unlearning changed, so they come last."""
    found = [
        Flips(
            engine.name,
            title_of(engine),
            engine.parity.flips[:SHOWN_FLIPS],
            len(engine.parity.flips),
        )
        for engine in report.engines
        if engine.parity is not None and engine.parity.flips
    ]
    return sorted(found, key=lambda flips: flips.engine == "base")


# --------------------------------------------------------------------------- filters


def shown(text: object) -> str:
    """Text from a file as it may be shown: no control or direction-changing characters."""
    return "".join(c if c.isprintable() else " " if c in "\n\t" else "�" for c in str(text))


def _token(token: str) -> str:
    """A tokenizer's piece as text: its mark for a space becomes one, a line end also shows."""
    return "⏎\n".join(shown(line) for line in token.replace("▁", " ").split("\n"))


def _number(value: float | int | str | None) -> str:
    if value is None:
        return "–"
    if value == 0:
        return "0"
    if isinstance(value, float):
        return f"{value:.1e}" if math.isfinite(value) else "not finite"
    return shown(value)


def _percent(share: float) -> str:
    """A place as an SVG length, in whole pixels' precision."""
    return f"{100 * share:.2f}%"
