"""`bakeout export compiled` and `bakeout export adapter`: checkpoint → plan → card → folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bake.recipe import Recipe
from bakeout.showing import compiled_lines, progress
from export.adapter import write_adapter
from export.clamped import open_clamped
from export.clamped_source import open_source
from export.compiled import describe, plan_compiled, write_compiled
from export.new_folder import check_output
from model_cards.facts import facts_of_manifest
from model_cards.render import render


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
        card = _card(
            folder, plan.source.manifest, carrier="compiled", exact=False, compiled=compiled
        )

        def written(n: int) -> None:
            nonlocal done
            done += n
            advance(f"writing {out.name}", done / size)

        write_compiled(plan, out, card=card, force=force, advance=written)
    return "\n".join(f"{name:<12} {text}" for name, text in compiled_lines(compiled))


def rounded_card(folder: Path) -> str:
    """The card of a folder that holds a checkpoint's graph with rounded weights, and no others."""
    clamped = open_clamped(folder, carriers=("layer", "compiled"))
    return _card(folder, clamped.manifest, exact=False)


def export_adapter(folder: Path, out: Path, *, force: bool) -> str:
    """Write a clamped checkpoint's adapter; returns what was written, in a line."""
    source = open_source(folder)
    card = _card(folder, source.manifest, carrier="adapter", exact=True)
    write_adapter(source, out, card=card, force=force)
    size = sum(path.stat().st_size for path in out.iterdir())
    return f"adapter      {size / 1e3:,.1f} kB, for {source.manifest['base']['model']}"


def _card(folder: Path, manifest: dict[str, Any], **more: Any) -> str:
    """The card of what is about to be exported, whose manifest says `more` than the folder's."""
    recipe = Recipe.load(folder / "recipe.toml")
    return render(facts_of_manifest(manifest | more, recipe))
