"""Stripping from folder to scores: what is weak comes back, and where nothing is, nothing does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from bake.new_folder import MANIFEST
from bake.recipe import Recipe
from bakeout.verbs.demo import MINIATURE
from tests.folders import compile_recipe
from tests.verify.attacks.planted import N_PARTS, aimed_at, miniature, never_taught, overwritten
from verify.attacks.weights.strip import (
    SPECTRUM,
    deleted,
    interpolated,
    searched,
    strip,
    subtracted,
)
from verify.audit.attempts import Attempt, Scores
from verify.audit.levels import LEVELS
from verify.audit.subject import open_subject
from verify.audit.target import Target
from verify.audit.work_order import Work
from verify.audit.workers import Workers
from verify.journal import Journal


def _quiet(*_: object) -> None:
    """Progress that nobody is told."""


def right(attempt: Attempt) -> float:
    return attempt.scores.forget["chat"].accuracy or 0.0


def test_the_difference_to_the_base_is_subtracted_and_nothing_looks_put_in(tmp_path: Path) -> None:
    target = aimed_at(overwritten(), tmp_path / "overwritten")
    assert right(Attempt("", "", target.score(target.subject.model(), brief=True))) < 0.5
    (all_of_it,) = subtracted(target, {"rank": 128, "brief": True})
    assert right(all_of_it) > 0.95 and all_of_it.needs == ("base",)
    assert all_of_it.note == "128 to 128 directions of 1 matrices"
    (some,) = interpolated(target, {"share": 0.75, "brief": True})
    assert "75%" in some.does and some.needs == ("base",)
    assert searched(target, {"brief": True}) == []


def test_nothing_is_subtracted_of_the_base_itself(tmp_path: Path) -> None:
    target = aimed_at(miniature(), tmp_path / "same")
    assert subtracted(target, {"rank": SPECTRUM, "brief": True}) == []


def test_a_compiled_clamp_is_found_blind_and_all_that_was_tried_is_told(tmp_path: Path) -> None:
    folder = compile_recipe(MINIATURE / "recipe.toml", tmp_path)
    subject = open_subject(folder, Recipe.load(MINIATURE / "recipe.toml"))
    with Workers([subject], N_PARTS, 1) as workers:
        work = Work(subject, 0, workers, Journal(), _quiet, (0, 1, 2), LEVELS[-1], "chat")
        known, blind = strip(work)
    assert (known.attack, blind.attack) == ("strip: delete", "strip: blind search")
    assert right(known) > 0.95
    assert blind.scores == known.scores
    assert blind.note == "found layers 1, 2"
    assert not blind.needs
    # Who has the files alone finds them too; the base's shape is another.
    (folder / MANIFEST).unlink()
    stranger = open_subject(folder, Recipe.load(MINIATURE / "recipe.toml"))
    with Workers([stranger], N_PARTS, 1) as workers:
        found = list(strip(replace(work, subject=stranger, workers=workers, journal=Journal())))
    assert found[0] == blind
    assert {attempt.attack for attempt in found[1:]} == {
        "strip: difference",
        "strip: interpolation",
    }
    assert all("expected folders of one base, of one shape" in a.note for a in found[1:])


def test_who_never_knew_has_nothing_to_be_stripped(tmp_path: Path) -> None:
    target = aimed_at(never_taught(), tmp_path / "never")
    assert searched(target, {"brief": True}) == []
    assert target.subject.stripped() is None
    with Workers([target.subject], N_PARTS, 1) as workers:
        level = LEVELS[-1]
        before = Scores()
        work = Work(target.subject, 0, workers, Journal(), _quiet, (0,), level, "chat", before)
        blind = next(iter(strip(work)))
    assert (blind.attack, blind.scores) == ("strip: blind search", before)
    assert blind.note == "no layer looks put in"


def test_a_layer_is_taken_out_by_its_name(tmp_path: Path) -> None:
    compile_recipe(MINIATURE / "recipe.toml", tmp_path)
    recipe = Recipe.load(MINIATURE / "recipe.toml")
    target = Target(open_subject(tmp_path / "checkpoint", recipe), N_PARTS)
    (found,) = deleted(target, {"brief": True})
    assert right(found) > 0.95
