"""`VerifyReport` → one self-contained HTML page: no script, nothing loaded from elsewhere."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, FunctionLoader, StrictUndefined
from jinja2.sandbox import ImmutableSandboxedEnvironment

from bake.new_folder import write_whole
from bake.questions.forms import forms_beside
from export.carriers.carriers import claim_of
from export.manifest import Manifest
from verify.page.sections import page_of
from verify.report.findings import VerifyReport
from verify.report.measures import Share
from verify.report.wording import (
    CONTROLS,
    answers_of,
    change_text,
    guess_text,
    letters_text,
    nats,
    number,
    percent,
    share_text,
    shown_text,
    text_shares_text,
    title_of,
)
from verify.tolerances import witness_bar

CLAIMS = {
    "exact": "exact: it computes the clamp itself",
    "exact to rounding": "exact to rounding: it computes the clamp, but for rounding",
    "an approximation": "an approximation of the clamp",
}


def render_html(report: VerifyReport, provenance: tuple[tuple[str, str], ...] = ()) -> str:
    """The page.

    Args:
        report: what was found. Sections without data are left out.
        provenance: (name, text), as `provenance` reads them from the folder.
    """
    made = environment("verify.page")
    made.filters |= {
        "explained": witness_bar,
        "shown": shown,
        "claim": lambda report: CLAIMS[claim_of(report.carrier, exact=report.exact)],
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
        "forms": lambda report: forms_beside(report.prompt),
        "by_length": text_shares_text,
        "guess": guess_text,
        "control": lambda name: CONTROLS.get(name, "–"),
    }
    return made.get_template("report.html.j2").render(page=page_of(report, provenance))


def environment(package: str, *, autoescape: bool = True) -> Environment:
    """The templates that lie in a package; what a template names and nobody gives is an error. They
    are bakeout's own; what they are given is not, and can do nothing.
    """
    return ImmutableSandboxedEnvironment(
        autoescape=autoescape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=not autoescape,
        loader=FunctionLoader(lambda name: files(package).joinpath(name).read_text("utf-8")),
    )


def write_html(report: VerifyReport, folder: Path, file: Path) -> None:
    """Write the page of a folder's report.

    Raises:
        OutputError: it cannot be written.
    """
    write_whole(file, render_html(report, provenance(folder)), option=f"--html {file}")


def provenance(folder: Path) -> tuple[tuple[str, str], ...]:
    """What a folder's manifest says of where it came from: (name, text)."""
    manifest = Manifest.read(folder)
    rows = [("base", manifest.base.title)]
    for clamp in manifest.clamps:
        settings = ", ".join(f"{k} {v}" for k, v in clamp.parameters.items())
        features = ", ".join(map(str, clamp.features))
        rows.append(
            (
                f"clamp, layer {clamp.layer}",
                f"{clamp.method} at {clamp.hook_point} ({settings}); features {features}; "
                f"SAE {clamp.sae.name} ({clamp.sae.architecture}, sha256 {clamp.sae.sha256})",
            )
        )
    rows.append(("recipe sha256", manifest.recipe_sha256))
    rows += [(f"source {name}", f"sha256 {digest}") for name, digest in manifest.sources.items()]
    tools = ", ".join(f"{name} {version}" for name, version in manifest.tools.items())
    rows.append(("made with", tools))
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
