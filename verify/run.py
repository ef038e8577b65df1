"""One verification from beginning to end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from bake.base import find_base
from bake.errors import FolderError, RecipeError
from bake.recipe import Recipe
from export.carriers.carriers import CARRIERS
from export.clamped import clamped_layers, read_config
from export.folder_contents import check_contents
from export.manifest import CARD, Manifest
from verify.clamped_folder import (
    check_base,
    check_layers,
    fitted_recipe,
    own_recipe,
    recorded_hooks,
)
from verify.engines.engines import open_engines
from verify.engines.onnx_files import find_graphs, graph_failures
from verify.evidence.integrity import check_integrity, code_failures, signature_found
from verify.evidence.kinds import KINDS, chosen_kinds, of_files
from verify.evidence.witnesses import load_witnesses, with_witnesses
from verify.expected.against_recipe import Checked, recipe_failures
from verify.expected.own_files import own_failures
from verify.gather import gather
from verify.journal import Journal, Others, Progress, files_below, journal_path
from verify.options import Options
from verify.report.findings import CLAIMED, Failure, VerifyReport
from verify.tolerances import remembering_failures

if TYPE_CHECKING:
    from verify.reference.whole_sae import Site

DEFAULTS = Options()
Select = Callable[[Recipe, Recipe], Recipe | None]


@dataclass(frozen=True)
class Asked:
    """What of a folder is measured, as another process has to be told."""

    folder: Path
    """Absolute."""
    recipe: Recipe
    """With features named."""
    kinds: frozenset[str]
    """Of evidence that engines and references give."""
    options: Options
    threads: int
    """Of torch."""
    report: VerifyReport
    """What was found in the folder's files."""


Helped = Callable[[Asked], AbstractContextManager[Callable[[str], Others]]]
"""Lets other processes help until it is left; gives by a journal's kind who they are."""


@dataclass(frozen=True)
class Said:
    """Whose word a verification takes."""

    given: bool = False
    """The recipe is the user's."""
    followed: bool = False
    """The folder's own recipe was followed."""
    claimed: bool = False
    """The features are those that the folder names, which the user's recipe leaves open."""
    signed_by: str | None = None
    """Whose signature holds, where one was asked for."""
    compared: bool = True
    """The files were hashed, and where there is a recipe held against what it makes."""

    @property
    def cannot_know(self) -> str | None:
        """What follows from that, in a sentence."""
        if self.claimed:
            return (
                "The features are those that the folder names: that they are the ones that the "
                "recipe would select, this run cannot know."
            )
        if self.given and not self.compared:
            return (
                "Without integrity this run cannot know what the engines do on text that it did "
                "not show them: neither the clamp nor any other file was held against the recipe."
            )
        if self.given:
            return None
        if self.followed:
            return (
                "The recipe is the folder's own: that it names the base, the features, the values "
                "and the questions that you expect, this run cannot know."
            )
        return (
            "Without a recipe this run cannot know whether the clamp is an SAE's, the weights are "
            "those of the base that the folder names, or anything was forgotten: whoever wrote the "
            "folder wrote its hashes and its witnesses too."
        )


def verify_folder(
    folder: Path,
    recipe: Recipe | None = None,
    only: frozenset[str] = frozenset(),
    progress: Progress | None = None,
    options: Options = DEFAULTS,
    select: Select | None = None,
    helped: Helped | None = None,
) -> VerifyReport:
    """Gather evidence about a folder that bakeout wrote.

    Code of others in the folder is looked for first, then files are hashed. Where there is some, or
    a file is not what the manifest says, that is the whole report: nothing of the folder is loaded.
    No code of it is ever run.

    Args:
        folder: a clamped checkpoint, or what was exported from one.
        recipe: what the reference is rebuilt from. Without one, the folder's own recipe is taken
            where everything in it can be had from the hub; else only integrity is checked, and
            the report's scope says so.
        only: kinds of evidence to gather; all when empty.
        progress: called with what is done and a share, 0 to 1: while files are hashed and models
            loaded, of that; afterwards of all that is to do.
        options: how it is run.
        select: given a recipe that leaves its features to be selected, and the same with the
            numbers that the folder names, gives it with those that are selected anew, or None
            where that cannot be done. Without it the folder is taken at its word, which the scope
            says.
        helped: lets other processes measure too, to the same report.

    Returns:
        The report; its `failures` are what is out of tolerance.

    Raises:
        BakeoutError: the folder, the recipe or what it names cannot be used.
    """
    kinds = chosen_kinds(only)
    tell = progress or _say_nothing
    manifest = Manifest.read(folder)
    carrier = CARRIERS.get(manifest.carrier)
    graphs = None
    broken = code_failures(folder, manifest)  # whatever is asked for
    if not broken and "integrity" in kinds:
        broken = check_integrity(folder, manifest, lambda share: tell("hash", share))
    elif not broken:
        check_contents(folder, manifest)
    signed_by = None
    if options.trust is not None and not broken:
        signed_by, broken = signature_found(folder, options.trust)
    given = recipe is not None
    said = Said(given, signed_by=signed_by, compared="integrity" in kinds)
    if broken:
        return _report(folder, manifest, {"integrity"}, said, broken)
    if "integrity" in kinds:
        layers: list[int] = []
        if carrier is not None and carrier.strips:
            layers = clamped_layers(read_config(folder, manifest.carrier))
        if carrier is not None and not carrier.over_base:
            graphs = find_graphs(folder)
            broken = graph_failures(graphs, layers, manifest.files)
        if not broken and carrier is not None:
            broken = tuple(own_failures(folder, manifest, graphs or ()))
        files_only = kinds == {"integrity"} and recipe is None
        if broken or (files_only and not options.tasks):
            return _report(folder, manifest, {"integrity"}, said, broken)
    if recipe is None and options.own_recipe:
        recipe = own_recipe(folder)
    said = replace(said, followed=recipe is not None and not given)
    asked = [*sorted(only - of_files()), *options.tasks]
    if recipe is None and asked:
        raise RecipeError(
            f"{', '.join(asked)}: the reference is rebuilt from a recipe, and that of "
            f"{folder.name} names local sources, or may not be followed; give the recipe with "
            "--recipe"
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
    sites: Sequence[Site] | None = None
    compared = "integrity" in kinds and (given or runs)
    if recipe is not None and (runs or compared):
        config = read_config(folder, manifest.carrier)
        fitted = fitted_recipe(recipe, folder, config, shown=runs)
        chosen = None if select is None or not recipe.selects else select(recipe, fitted)
        said = replace(said, claimed=recipe.selects and chosen is None)
        recipe = chosen or fitted
        if carrier is not None and carrier.over_base:
            check_base(recipe, folder, config)
        if compared:
            from verify.reference.whole_sae import load_sites

            tell("load", 0.0)
            sites = load_sites(recipe, recorded_hooks(manifest))
            check_layers([site.layer for site in sites], folder, config)
            checked = Checked(folder, manifest, recipe, sites, graphs or ())
            if broken := tuple(recipe_failures(checked)):
                return _report(folder, manifest, {"integrity"}, said, broken)
    report = _report(folder, manifest, kinds, said)
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
        asked_of = Asked(*(folder.resolve(), recipe, measured, options, engines.threads, report))
        with (
            nullcontext(lambda _: None) if helped is None else helped(asked_of) as others,
            Journal(paths[0], keep=True, others=others("references")) as of_base,
            Journal(paths[1], of_base, keep=options.keep, others=others("verify")) as journal,
        ):
            report = gather(
                folder, recipe, report, measured, tell, engines, journal, options, sites
            )
    found = [failure for name in KINDS if name in kinds for failure in KINDS[name].failures(report)]
    if "choices" in kinds:
        trained = carrier is not None and carrier.trained
        found += remembering_failures(report, trained=trained, claimed=said.claimed)
    return replace(report, failures=(*report.failures, *found))


def _report(
    folder: Path,
    manifest: Manifest,
    kinds: Iterable[str],
    said: Said,
    failures: Iterable[Failure] = (),
) -> VerifyReport:
    scope = "full" if set(kinds) == set(KINDS) else "+".join(k for k in KINDS if k in kinds)
    return VerifyReport(
        folder=folder.resolve().name,
        carrier=manifest.carrier,
        exact=manifest.exact,
        scope=scope + (CLAIMED if said.claimed else ""),
        signed_by=said.signed_by,
        cannot_know=said.cannot_know,
        failures=tuple(failures),
        manifest_sha256=manifest.sha256,
        card_sha256=manifest.files.get(CARD),
    )


def _say_nothing(stage: str, share: float) -> None:
    """Progress that nobody watches."""
