"""One verification from beginning to end."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from bake.base import INDEX, find_base
from bake.errors import FolderError, RecipeError
from bake.recipe import Recipe
from verify.clamped_folder import (
    base_failures,
    check_base,
    clamped_layers,
    fitted_recipe,
    own_recipe,
    read_config,
)
from verify.comparison import REFERENCE
from verify.engines import NAMES, open_engines
from verify.evidence import REFERENCES, Evidence, gather
from verify.integrity import CARD, Manifest, check_integrity, read_manifest
from verify.journal import Journal, Progress, files_below, journal_path
from verify.kinds import KINDS, Options, chosen_kinds
from verify.onnx_files import find_graphs, graph_failures
from verify.prompts import TEXT_TOKENS
from verify.report import Failure, VerifyReport
from verify.tolerances import (
    is_held,
    loss_failures,
    parity_failures,
    silent_clamps,
    unlearning_failures,
)
from verify.witnesses import load_witnesses, with_witnesses

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
        progress: called with a stage (hash, load, compare) and the share of it done, 0 to 1.
        options: how it is run.

    Returns:
        The report; its `failures` are what is out of tolerance.

    Raises:
        BakeoutError: the folder, the recipe or what it names cannot be used.
    """
    kinds = chosen_kinds(only)
    tell = progress or _say_nothing
    manifest = read_manifest(folder)
    layered = manifest.carrier == "layer"
    graphs = None
    if "integrity" in kinds:
        broken = check_integrity(folder, manifest, lambda share: tell("hash", share))
        if not broken and manifest.carrier in ("layer", "compiled"):
            graphs = find_graphs(folder)
            layers = clamped_layers(read_config(folder)) if layered else []
            broken = graph_failures(graphs, layers, manifest.files)
        if broken or (kinds == {"integrity"} and not options.tasks):
            return _report(folder, manifest, {"integrity"}, broken)
    recipe = recipe or own_recipe(folder)
    asked = [*sorted(only - {"integrity", "witnesses"}), *options.tasks]
    if recipe is None and asked:
        raise RecipeError(
            f"{', '.join(asked)}: the reference is rebuilt from a recipe, and "
            f"{folder.name} names local sources; give the recipe with --recipe"
        )
    if manifest.carrier not in NAMES and recipe is not None:
        raise FolderError(
            f"{folder.name}: carries the clamp as {manifest.carrier}; parity, choices and loss "
            f"are measured for {', '.join(NAMES)}. Use --only integrity"
        )
    witnesses = load_witnesses(folder) if "witnesses" in kinds else None
    if witnesses is None and "witnesses" in only:
        raise FolderError(
            f"{folder.name}: has no witnesses; `bakeout bake --witnesses` and "
            "`bakeout export onnx` write them"
        )
    if recipe is None:
        kinds &= {"integrity", "witnesses"} if witnesses else {"integrity"}
    measured = kinds - {"integrity", "witnesses"}
    runs = bool(measured or options.tasks)
    if recipe is not None and runs:
        config = read_config(folder, manifest.carrier)
        recipe = fitted_recipe(recipe, folder, config)
        if manifest.carrier == "adapter":
            check_base(recipe, folder, config)
        own = layered and "integrity" in kinds and INDEX in manifest.files
        if own and (broken := base_failures(recipe, manifest.files)):
            return _report(folder, manifest, {"integrity"}, broken)
    report = _report(folder, manifest, kinds)
    if not runs and witnesses is None:
        return report
    if graphs is None:
        graphs = find_graphs(folder)
    with open_engines(folder, manifest.carrier, graphs, options.device) as engines:
        if witnesses is not None:
            tell("witnesses", 0.0)
            report = with_witnesses(report, witnesses, engines)
        if recipe is None or not runs:
            return report
        work = {
            "manifest": manifest.sha256,
            "recipe": recipe.to_dict(),
            "kinds": sorted(measured),
            "device": [options.device, engines.threads],
            "asked": [options.budget, options.tasks],
            "files": files_below([folder, find_base(recipe).folder, *recipe.local_sources]),
        }
        path = None if options.cache is None else journal_path(options.cache, work)
        with Journal(path) as journal:
            evidence = gather(folder, recipe, measured, tell, engines, journal, options)
    witnessed = {engine.name: engine.witnessed for engine in report.engines}
    failures = report.failures
    if "parity" in kinds:
        failures += tuple(silent_clamps(evidence.fired_by_layer))
        failures += tuple(_engine_failures(evidence))
    failures += tuple(
        failure
        for engine in evidence.engines
        if engine.name in (REFERENCE, "checkpoint", "adapter")
        for failure in loss_failures(engine)
    )
    assert recipe.verify is not None
    return replace(
        report,
        engines=tuple(
            replace(engine, witnessed=witnessed.get(engine.name)) for engine in evidence.engines
        ),
        failures=failures,
        dtype=evidence.dtype,
        prompt=recipe.verify.prompt,
        items=evidence.items,
        fired_by_layer=evidence.fired_by_layer,
        warnings=_silent_features(evidence.never_active, corpus=recipe.select is not None),
        examples=evidence.examples,
        known=evidence.known,
        controls=evidence.controls,
        completions=evidence.completions,
        robustness=evidence.robustness,
    )


def _engine_failures(evidence: Evidence) -> Iterator[Failure]:
    """What is out of tolerance, engine by engine."""
    found = {engine.name: engine for engine in evidence.engines}
    items = evidence.items
    n_answers = 2 * (items.forget_questions + items.retain_questions)  # in both prompt forms
    for name, engine in found.items():
        if engine.parity is None or name in REFERENCES:
            continue
        if is_held(name):
            yield from parity_failures(name, engine.parity, n_answers)
        else:
            yield from unlearning_failures(engine, found[REFERENCE], items.forget_questions)


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


def _silent_features(never_active: Iterable[tuple[int, int]], *, corpus: bool) -> tuple[str, ...]:
    """One line for each layer; `corpus`: the forget corpus was looked at too."""
    by_layer: dict[int, list[str]] = {}
    for layer, feature in never_active:
        by_layer.setdefault(layer, []).append(str(feature))
    also = f", nor in the first {TEXT_TOKENS:,} tokens of the forget corpus" if corpus else ""
    return tuple(
        f"layer {layer}: never active on the forget questions{also}: feature {', '.join(features)}"
        for layer, features in by_layer.items()
    )


def _say_nothing(stage: str, share: float) -> None:
    """Progress that nobody watches."""
