"""`VerifyReport` → one self-contained HTML page: no script, nothing loaded from elsewhere."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined

from export.new_folder import MANIFEST
from verify.integrity import read_manifest
from verify.measures import Share
from verify.page import page_of
from verify.report import VerifyReport
from verify.tolerances import witness_bar
from verify.wording import (
    CONTROLS,
    answers_of,
    change_text,
    letters_text,
    nats,
    number,
    percent,
    share_text,
    shown_text,
    title_of,
)


def render_html(report: VerifyReport, provenance: tuple[tuple[str, str], ...] = ()) -> str:
    """The page.

    Args:
        report: what was found. Sections without data are left out.
        provenance: (name, text), as `provenance` reads them from the folder.
    """
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=FunctionLoader(lambda name: files("verify").joinpath(name).read_text("utf-8")),
    )
    environment.filters |= {
        "explained": witness_bar,
        "shown": shown,
        "token": _token,
        "piece": _piece,
        "number": lambda value: shown(number(value)),
        "pct": _place,
        "percent": percent,
        "probability": _probability,
        "title_of": title_of,
        "answers": answers_of,
        "share": share_text,
        "tally": _tally,
        "change": change_text,
        "letters": letters_text,
        "nats": nats,
        "shown_to_all": shown_text,
        "control": lambda name: CONTROLS.get(name, "–"),
    }
    template = environment.get_template("report.html.j2")
    return template.render(page=page_of(report, provenance))


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


# --------------------------------------------------------------------------- filters


def shown(text: object) -> str:
    """Text from a file as it may be shown: no control or direction-changing characters."""
    return "".join(c if c.isprintable() else " " if c in "\n\t" else "�" for c in str(text))


def _token(token: str) -> str:
    """A tokenizer's piece as text: its mark for a space becomes one, a line end also shows."""
    return "⏎\n".join(shown(line) for line in token.replace("▁", " ").split("\n"))


def _place(share: float) -> str:
    """A place as an SVG length, in whole pixels' precision."""
    return f"{100 * share:.2f}%"


def _piece(token: str) -> str:
    """A token on its own: spaces and line ends show."""
    return shown(token.replace("\n", "⏎")).replace("▁", "␣").replace(" ", "␣")


def _probability(p: float) -> str:
    return f"{p:.3f}" if p >= 0.0005 or p == 0 else f"{p:.0e}"


def _tally(share: Share | None) -> str:
    return "–" if share is None or not share.n else f"{share.right} of {share.n}"
