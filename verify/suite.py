"""One verification from beginning to end."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from bake.errors import BakeoutError, FolderError, RecipeError
from bake.recipe import Recipe
from verify.clamped_folder import clamped_layers, fitted_recipe, own_recipe, read_config
from verify.engines import Engines
from verify.evidence import CHECKPOINT, Evidence, Progress, gather
from verify.integrity import CARD, Manifest, check_integrity, read_manifest
from verify.onnx_files import EXACT, find_graphs, graph_failures
from verify.parity import parity_failures, silent_clamps, unlearning_failures
from verify.prompts import TEXT_TOKENS
from verify.report import Failure, VerifyReport
from verify.runners import TorchRunner
from verify.witnesses import load_witnesses, with_witnesses

KINDS = ("integrity", "witnesses", "parity", "choices", "loss")
"""Kinds of evidence, by the names that `only` takes."""


class KindError(BakeoutError):
    """A kind of evidence that there is not."""


def verify_folder(
    folder: Path,
    recipe: Recipe | None = None,
    only: frozenset[str] = frozenset(),
    progress: Progress | None = None,
    *,
    device: str = "cpu",
) -> VerifyReport:
    """Gather evidence about a folder that bakeout wrote.

    Files are hashed first. When one is not what the manifest says, that is the whole report:
    nothing from the folder is executed.

    Args:
        folder: a clamped checkpoint.
        recipe: what the reference is rebuilt from. Without one, the folder's own recipe is taken
            where everything in it can be had from the hub; else only integrity is checked, and
            the report's scope says so.
        only: kinds of evidence to gather; all when empty.
        progress: called with a stage (hash, load, compare) and the share of it done, 0 to 1.
        device: where base, reference and checkpoint run, as torch names it.

    Returns:
        The report; its `failures` are what is out of tolerance.

    Raises:
        BakeoutError: the folder, the recipe or what it names cannot be used.
    """
    kinds = _kinds(only)
    tell = progress or _say_nothing
    manifest = read_manifest(folder)
    graphs = None
    if "integrity" in kinds:
        broken = check_integrity(folder, manifest, lambda share: tell("hash", share))
        if not broken and manifest.carrier == "layer":
            graphs = find_graphs(folder)
            layers = clamped_layers(read_config(folder))
            broken = graph_failures(graphs, layers, manifest.files)
        if broken or kinds == {"integrity"}:
            return _report(folder, manifest, {"integrity"}, broken)
    recipe = recipe or own_recipe(folder)
    if recipe is None and (measured := only - {"integrity", "witnesses"}):
        raise RecipeError(
            f"{', '.join(sorted(measured))}: the reference is rebuilt from a recipe, and "
            f"{folder.name} names local sources; give the recipe with --recipe"
        )
    if manifest.carrier != "layer" and recipe is not None:
        raise FolderError(
            f"{folder.name}: carries the clamp as {manifest.carrier}; parity, choices and loss "
            "are measured for `layer`. Use --only integrity"
        )
    witnesses = load_witnesses(folder) if "witnesses" in kinds else None
    if witnesses is None and "witnesses" in only:
        raise FolderError(
            f"{folder.name}: has no witnesses; `bakeout bake --witnesses` and "
            "`bakeout export onnx` write them"
        )
    if recipe is None:
        kinds &= {"integrity", "witnesses"} if witnesses else {"integrity"}
    measured = kinds & {"parity", "choices", "loss"}
    if recipe is not None and measured:
        recipe = fitted_recipe(recipe, folder, read_config(folder))
    report = _report(folder, manifest, kinds)
    if not measured and witnesses is None:
        return report
    with ExitStack() as stack:
        engines = Engines(
            stack.enter_context(TorchRunner(folder, CHECKPOINT)) if _has_weights(folder) else None,
            find_graphs(folder) if graphs is None else graphs,
            device,
        )
        if witnesses is not None:
            tell("witnesses", 0.0)
            report = with_witnesses(report, witnesses, engines)
        if recipe is None or not measured:
            return report
        evidence = gather(folder, recipe, measured, tell, engines)
    witnessed = {engine.name: engine.witnessed for engine in report.engines}
    assert recipe.verify is not None
    return replace(
        report,
        engines=tuple(
            replace(engine, witnessed=witnessed.get(engine.name)) for engine in evidence.engines
        ),
        failures=report.failures + _evidence_failures(evidence, kinds),
        dtype=evidence.dtype,
        prompt=recipe.verify.prompt,
        items=evidence.items,
        fired_by_layer=evidence.fired_by_layer,
        warnings=_silent_features(evidence.never_active),
        examples=evidence.examples,
    )


def _has_weights(folder: Path) -> bool:
    """Whether a folder holds a checkpoint, or rounded ONNX files alone."""
    return (folder / "model.safetensors.index.json").is_file()


def _evidence_failures(evidence: Evidence, kinds: frozenset[str]) -> tuple[Failure, ...]:
    """What is out of tolerance, engine by engine."""
    failures: list[Failure] = []
    if "parity" in kinds:
        failures += silent_clamps(evidence.fired_by_layer)
    reference = next(engine for engine in evidence.engines if engine.name == "reference")
    for engine in evidence.engines:
        if engine.name in (CHECKPOINT, EXACT) and engine.parity is not None:
            here = engine.name == CHECKPOINT
            failures += parity_failures(
                engine.name,
                engine.parity,
                evidence.dtype if here else "float32",
                other_arithmetic=not here,
            )
        elif engine.name.startswith("onnx-"):
            failures += unlearning_failures(engine, reference)
    return tuple(failures)


def _kinds(only: frozenset[str]) -> frozenset[str]:
    for kind in sorted(only):
        if kind not in KINDS:
            close = difflib.get_close_matches(kind, KINDS, 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise KindError(
                f'no kind of evidence "{kind}"; expected one of {", ".join(KINDS)}{hint}'
            )
    return only or frozenset(KINDS)


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


def _silent_features(never_active: Iterable[tuple[int, int]]) -> tuple[str, ...]:
    """One line for each layer."""
    by_layer: dict[int, list[str]] = {}
    for layer, feature in never_active:
        by_layer.setdefault(layer, []).append(str(feature))
    return tuple(
        f"layer {layer}: never active on the forget questions, nor in the first "
        f"{TEXT_TOKENS:,} tokens of the forget corpus: feature {', '.join(features)}"
        for layer, features in by_layer.items()
    )


def _say_nothing(stage: str, share: float) -> None:
    """Progress that nobody watches."""
