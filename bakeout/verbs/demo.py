"""`bakeout demo`: the main job on the shipped miniature, from recipe to evidence."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

import bakeout
from bake.recipe import Recipe
from bakeout.terminal import console, progress, show_report, write_json
from bakeout.verbs.baking import bake_recipe
from bakeout.verbs.exporting import EXPORTS
from export.carriers.onnx.onnx_folder import export_onnx
from export.carriers.onnx.precisions import PRECISIONS
from export.witness_file import WITNESSES
from verify.evidence.kinds import KINDS
from verify.options import Options
from verify.page.html import write_html
from verify.report.findings import VerifyReport
from verify.run import verify_folder

MINIATURE = Path(bakeout.__file__).parent / "miniature"

OF_CARRIERS = frozenset(name for name, kind in KINDS.items() if kind.shows) | {"integrity"}
"""Kinds of evidence about the other carriers: what the forgetting is worth is the same for all."""


def run_demo(out: Path, budget: int = Options.budget) -> int:
    """Select, bake, export, verify, print what was found.

    Args:
        out: folder for a folder per carrier, `statistics/`, lm-evaluation-harness's results and the
            report, as JSON and as a page.
        budget: steps of the suffix search.

    Returns:
        The exit code.
    """
    start = time.monotonic()
    folder, recipe_file = out / "checkpoint", MINIATURE / "recipe.toml"
    plan = bake_recipe(recipe_file, folder, force=True, cache=out)
    for precision in PRECISIONS:
        with progress(f"export onnx {precision}") as advance:
            export_onnx(folder, precision=precision, progress=advance)
    for name, export in EXPORTS.items():
        export(folder, out / name, force=True)
    recipe = Recipe.load(recipe_file)
    assert recipe.select is not None
    n_selected = sum(len(clamp.clamp.features) for clamp in plan.clamps)
    console().print(f"{n_selected} features selected by {recipe.select.by}, baked, now compared\n")
    with progress(f"verify {folder.name}") as advance:
        options = Options(cache=out, budget=budget, tasks=("local",), evals=out / "lm-eval")
        reports = [verify_folder(folder, recipe, progress=advance, options=options)]
    for carrier in (out / name for name in EXPORTS):
        with progress(f"verify {carrier.name}") as advance:
            more = {"witnesses"} if (carrier / WITNESSES).is_file() else set()
            reports.append(verify_folder(carrier, recipe, OF_CARRIERS | more, advance))
    report = side_by_side(reports)
    write_json(report.to_dict(), out / "report.json")
    write_html(report, folder, out / "report.html")
    show_report(report)
    console().print(
        f"\n{folder}  ({time.monotonic() - start:.0f} s, report in {out / 'report.html'})\n\n"
        "    from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f'    model = AutoModelForCausalLM.from_pretrained("{folder}", trust_remote_code=True)\n'
        f'    tokenizer = AutoTokenizer.from_pretrained("{folder}")\n',
        markup=False,
    )
    return report.exit_code


def side_by_side(reports: Sequence[VerifyReport]) -> VerifyReport:
    """The first report, with the engines and failures that only the others have."""
    first, *others = reports
    engines = {engine.name: engine for report in reports for engine in report.engines}
    return replace(
        first,
        engines=(*first.engines, *(e for n, e in engines.items() if first.engine(n) is None)),
        failures=first.failures + tuple(f for report in others for f in report.failures),
    )


def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything that the demo writes.")] = Path(
        "runs/demo"
    ),
) -> None:
    """Bake the shipped miniature, load the result as a stranger would, and compare."""
    raise typer.Exit(run_demo(out))
