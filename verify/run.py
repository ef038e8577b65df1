"""One verification from beginning to end."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from bake.base import INDEX, find_base
from bake.errors import FolderError, RecipeError
from bake.recipe import Recipe
from export.carriers.carriers import CARRIERS
from export.clamped import clamped_layers, read_config
from export.folder_contents import check_contents
from export.manifest import CARD, Manifest
from verify.clamped_folder import base_failures, check_base, fitted_recipe, own_recipe
from verify.engines.engines import open_engines
from verify.engines.onnx_files import find_graphs, graph_failures
from verify.evidence.integrity import check_integrity
from verify.evidence.kinds import KINDS, chosen_kinds, of_files
from verify.evidence.witnesses import load_witnesses, with_witnesses
from verify.gather import gather
from verify.journal import Journal, Progress, files_below, journal_path
from verify.options import Options
from verify.report.findings import Failure, VerifyReport

DEFAULTS = Options()


def verify_folder(
    folder: Path,
    recipe: Recipe | None = None,
    only: frozenset[str] = frozenset(),
    progress: Progress | None = None,
    options: Options = DEFAULTS,
) -> VerifyReport:
    """Gather evidence about a folder that bakeout wrote.

    Files are hashed first. When one is not what the manifest says, that is the whole report:
    nothing from the folder is executed.

    Args:
        folder: a clamped checkpoint, or what was exported from one.
        recipe: what the reference is rebuilt from. Without one, the folder's own recipe is taken
            where everything in it can be had from the hub; else only integrity is checked, and
            the report's scope says so.
        only: kinds of evidence to gather; all when empty.
        progress: called with what is done and a share, 0 to 1: while files are hashed and models
            loaded, of that; afterwards of all that is to do.
        options: how it is run.

    Returns:
        The report; its `failures` are what is out of tolerance.

    Raises:
        BakeoutError: the folder, the recipe or what it names cannot be used.
    """
    kinds = chosen_kinds(only)
    tell = progress or _say_nothing
    manifest = Manifest.read(folder)
    carrier = CARRIERS.get(manifest.carrier)
    own = carrier is not None and carrier.own_code
    graphs = None
    if "integrity" in kinds:
        broken = check_integrity(folder, manifest, lambda share: tell("hash", share))
        if not broken and carrier is not None and not carrier.over_base:
            graphs = find_graphs(folder)
            layers = clamped_layers(read_config(folder, manifest.carrier)) if own else []
            broken = graph_failures(graphs, layers, manifest.files)
        if broken or (kinds == {"integrity"} and not options.tasks):
            return _report(folder, manifest, {"integrity"}, broken)
    else:
        check_contents(folder, manifest)
    recipe = recipe or own_recipe(folder)
    asked = [*sorted(only - of_files()), *options.tasks]
    if recipe is None and asked:
        raise RecipeError(
            f"{', '.join(asked)}: the reference is rebuilt from a recipe, and "
            f"{folder.name} names local sources; give the recipe with --recipe"
        )
    if carrier is None and (recipe is not None or "witnesses" in only):
        raise FolderError(
            f"{folder.name}: carries the clamp as {manifest.carrier}; what is more than "
            f"integrity is measured for {', '.join(CARRIERS)}. Use --only integrity"
        )
    witnesses = load_witnesses(folder) if carrier is not None and "witnesses" in kinds else None
    if witnesses is None and "witnesses" in only:
        raise FolderError(
            f"{folder.name}: has no witnesses; expected some, which `bakeout bake --witnesses` and "
            "`bakeout export onnx` write"
        )
    if recipe is None:
        kinds &= of_files() if witnesses else {"integrity"}
    measured = kinds - of_files()
    runs = bool(measured or options.tasks)
    if recipe is not None and runs:
        config = read_config(folder, manifest.carrier)
        recipe = fitted_recipe(recipe, folder, config)
        if carrier is not None and carrier.over_base:
            check_base(recipe, folder, config)
        compared = own and "integrity" in kinds and INDEX in manifest.files
        if compared and (broken := base_failures(recipe, manifest.files)):
            return _report(folder, manifest, {"integrity"}, broken)
    report = _report(folder, manifest, kinds)
    if not runs and witnesses is None:
        return report
    if graphs is None:
        graphs = find_graphs(folder, manifest.files)
    with open_engines(folder, manifest.carrier, graphs, options.device) as engines:
        if witnesses is not None:
            tell("witnesses", 0.0)
            report = with_witnesses(report, witnesses, engines)
        if recipe is None or not runs:
            return report
        shared = {
            "recipe": recipe.to_dict(),
            "device": [options.device, engines.threads],
            "files": files_below([find_base(recipe).folder, *recipe.local_sources]),
        }
        alone = {
            "manifest": manifest.sha256,
            "kinds": sorted(measured),
            "asked": [options.budget, options.tasks, options.minutes],
            "folder": [] if "integrity" in kinds else files_below([folder]),
        }
        paths = [
            None if options.cache is None else journal_path(options.cache, work, kind)
            for work, kind in ((shared, "references"), (shared | alone, "verify"))
        ]
        with (
            Journal(paths[0], keep=True) as of_base,
            Journal(paths[1], of_base, keep=options.keep) as journal,
        ):
            report = gather(folder, recipe, report, measured, tell, engines, journal, options)
    found = [failure for name in KINDS if name in kinds for failure in KINDS[name].failures(report)]
    return replace(report, failures=(*report.failures, *found))


def _report(
    folder: Path, manifest: Manifest, kinds: Iterable[str], failures: Iterable[Failure] = ()
) -> VerifyReport:
    return VerifyReport(
        folder=folder.resolve().name,
        carrier=manifest.carrier,
        exact=manifest.exact,
        scope="full" if set(kinds) == set(KINDS) else "+".join(k for k in KINDS if k in kinds),
        failures=tuple(failures),
        manifest_sha256=manifest.sha256,
        card_sha256=manifest.files.get(CARD),
    )


def _say_nothing(stage: str, share: float) -> None:
    """Progress that nobody watches."""
