"""`bakeout demo`: the main job on the shipped miniature, from recipe to evidence."""

from __future__ import annotations

import time
from pathlib import Path

import bakeout
from bake.recipe import Recipe
from bakeout.baking import bake_recipe
from bakeout.cli import write_json
from bakeout.showing import console, progress, show_report
from export.onnx_folder import export_onnx
from export.onnx_weights import PRECISIONS
from verify.html import write_html
from verify.suite import verify_folder

MINIATURE = Path(bakeout.__file__).parent / "miniature"


def run_demo(out: Path) -> int:
    """Bake, verify, print one table; leaves the folder and its report, twice, below `out`."""
    start = time.monotonic()
    folder, recipe_file = out / "checkpoint", MINIATURE / "recipe.toml"
    bake_recipe(recipe_file, folder, force=True)
    for precision in PRECISIONS:
        with progress(f"export onnx {precision}") as advance:
            export_onnx(folder, precision=precision, progress=advance)
    recipe = Recipe.load(recipe_file)
    with progress("verify") as advance:
        report = verify_folder(folder, recipe, progress=advance)
    write_json(report, out / "report.json")
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
