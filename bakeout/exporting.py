"""`bakeout export compiled` and `bakeout export adapter`: checkpoint → plan → card → folder."""

from __future__ import annotations

import tomllib
from pathlib import Path

from bakeout.showing import compiled_lines, progress
from export.adapter import write_adapter
from export.clamped_source import ClampedSource, open_source
from export.compiled import describe, plan_compiled, write_compiled
from export.new_folder import check_output
from model_cards.render import render_export_card


def export_compiled(
    folder: Path, out: Path, *, pad: int | None, dtype: str | None, force: bool
) -> str:
    """Compile a clamped checkpoint; returns what was written, in a few lines."""
    with progress("compile") as advance:
        advance(f"measuring {folder.name}", 0.0)
        plan = plan_compiled(folder, pad=pad, dtype=dtype)
        size, done = plan.size, 0
        check_output(out, inputs=[folder], size=size, force=force)
        compiled = describe(plan)
        card = render_export_card(
            plan.source.manifest | {"compiled": compiled}, "compiled", _license(plan.source)
        )

        def written(n: int) -> None:
            nonlocal done
            done += n
            advance(f"writing {out.name}", done / size)

        write_compiled(plan, out, card=card, force=force, advance=written)
    return "\n".join(f"{name:<12} {text}" for name, text in compiled_lines(compiled))


def export_adapter(folder: Path, out: Path, *, force: bool) -> str:
    """Write a clamped checkpoint's adapter; returns what was written, in a line."""
    source = open_source(folder)
    card = render_export_card(source.manifest, "adapter", _license(source))
    write_adapter(source, out, card=card, force=force)
    size = sum(path.stat().st_size for path in out.iterdir())
    return f"adapter      {size / 1e3:,.1f} kB, for {source.manifest['base']['model']}"


def _license(source: ClampedSource) -> str:
    """As the folder's recipe states it."""
    recipe = tomllib.loads((source.folder / "recipe.toml").read_text(encoding="utf-8"))
    return str(recipe["base"].get("license", "gemma"))
