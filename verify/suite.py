"""One verification from beginning to end."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path

from bake.errors import BakeoutError, FolderError, RecipeError
from bake.recipe import Recipe
from verify.clamped_folder import check_base, fitted_recipe, own_recipe, read_config
from verify.evidence import ENGINES, Progress, gather
from verify.integrity import Manifest, check_integrity, read_manifest
from verify.parity import parity_failures, silent_clamps
from verify.prompts import TEXT_TOKENS
from verify.report import Failure, VerifyReport

KINDS = ("integrity", "parity", "choices", "loss")
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
        folder: a clamped checkpoint, or what was exported from one.
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
    if "integrity" in kinds:
        failures = check_integrity(folder, manifest, lambda share: tell("hash", share))
        if failures or kinds == {"integrity"}:
            return _integrity_report(folder, manifest, failures)
    recipe = recipe or own_recipe(folder)
    if recipe is None:
        if only:
            raise RecipeError(
                f"{', '.join(sorted(only - {'integrity'}))}: the reference is rebuilt from a "
                f"recipe, and {folder.name} names local sources; give the recipe with --recipe"
            )
        return _integrity_report(folder, manifest, ())
    if manifest.carrier not in ENGINES:
        raise FolderError(
            f"{folder.name}: carries the clamp as {manifest.carrier}; parity, choices and loss "
            f"are measured for {', '.join(ENGINES)}. Use --only integrity"
        )
    config = read_config(folder, manifest.carrier)
    recipe = fitted_recipe(recipe, folder, config)
    if manifest.carrier == "adapter":
        check_base(recipe, folder, config)
    evidence = gather(folder, manifest.carrier, recipe, kinds - {"integrity"}, tell, device)
    failures = ()
    if "parity" in kinds:
        name = ENGINES[manifest.carrier]
        engine = next(engine for engine in evidence.engines if engine.name == name)
        assert engine.parity is not None
        items = evidence.items
        # A folder of 16-bit weights is held to 16 bits, whatever it is run in.
        stored = config.get("dtype") if manifest.carrier == "compiled" else None
        precision = stored if evidence.dtype == "float32" and stored else evidence.dtype
        n_answers = 2 * (items.forget_questions + items.retain_questions)  # in both prompt forms
        failures = (
            *silent_clamps(evidence.fired_by_layer),
            *parity_failures(
                name, engine.parity, precision, exact=manifest.exact, n_answers=n_answers
            ),
        )
    assert recipe.verify is not None
    return VerifyReport(
        folder=folder.resolve().name,
        carrier=manifest.carrier,
        exact=manifest.exact,
        scope="full" if kinds == frozenset(KINDS) else "+".join(k for k in KINDS if k in kinds),
        failures=failures,
        engines=evidence.engines,
        dtype=evidence.dtype,
        prompt=recipe.verify.prompt,
        items=evidence.items,
        fired_by_layer=evidence.fired_by_layer,
        warnings=_silent_features(evidence.never_active),
    )


def _kinds(only: frozenset[str]) -> frozenset[str]:
    for kind in sorted(only):
        if kind not in KINDS:
            close = difflib.get_close_matches(kind, KINDS, 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise KindError(
                f'no kind of evidence "{kind}"; expected one of {", ".join(KINDS)}{hint}'
            )
    return only or frozenset(KINDS)


def _integrity_report(
    folder: Path, manifest: Manifest, failures: tuple[Failure, ...]
) -> VerifyReport:
    return VerifyReport(
        folder=folder.resolve().name,
        carrier=manifest.carrier,
        exact=manifest.exact,
        scope="integrity",
        failures=failures,
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
