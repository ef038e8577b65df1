"""An audit from folder to report: what it says, where it stops, and how it goes on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bake.errors import BakeoutError, FolderError, RecipeError
from bake.recipe import Recipe
from tests.folders import recipe_variant
from tests.verify.audit.audited import audited_world
from tests.worlds import write_jsonl
from verify.attacks import relearn as relearning
from verify.attacks.audits import AUDITS
from verify.audit import run_audit
from verify.audit.attempts import Attempt, Settings
from verify.audit.audit_report import AuditReport
from verify.audit.audit_words import sentences
from verify.audit.levels import LEVELS
from verify.audit.outcome import told_by
from verify.audit.run_audit import AuditOptions, audit_folders
from verify.audit.target import Target


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("audit")
    audited_world(folder)
    shutil.copytree(folder / "base", folder / "plain")
    return folder


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """One attack, few settings, few steps."""
    monkeypatch.setattr(run_audit, "AUDITS", {"relearn": AUDITS["relearn"]})
    monkeypatch.setattr(run_audit, "LEVELS", tuple(replace(of, most_steps=2) for of in LEVELS))
    monkeypatch.setattr(relearning, "QUICK_RATES", (1e-3, 1e-4))
    monkeypatch.setattr(relearning, "FIRST", 1)
    monkeypatch.setattr(relearning, "arms_of", lambda _: [("other", True), ("same", False)])


def audit(world: Path, *names: str, **options: Any) -> AuditReport:
    recipe = Recipe.load(world / "recipe.toml")
    chosen = AuditOptions(**{"quick": True, "processes": 1, **options})
    return audit_folders([world / name for name in names], recipe, chosen)


def test_a_report_names_what_was_measured(world: Path) -> None:
    report = audit(world, "checkpoint", "plain")
    assert (report.exit_code, report.level, report.failures) == (0, "quick", ())
    clamped, plain = report.folders
    assert (clamped.folder, clamped.carrier, clamped.exact) == ("checkpoint", "layer", True)
    assert (plain.folder, plain.carrier, plain.exact) == ("plain", None, None)
    assert clamped.stripped == clamped.base == plain.before == plain.base
    assert plain.stripped is None
    assert clamped.before != clamped.base
    assert {sweep.attack for sweep in clamped.sweeps} == {
        "relearn: other facts, LoRA",
        "relearn: same facts, all weights",
        "relearn: control, same facts, all weights",
    }
    for sweep in clamped.sweeps:
        assert [point.steps for point in sweep.curve] == [2]
        assert {point.seeds for point in sweep.curve} == {3}
        assert sum(point.right.n for point in sweep.curve) == 9  # each fact once


def test_interrupted_anywhere_it_goes_on_to_the_same_report(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = json.dumps(audit(world, "checkpoint", cache=tmp_path / "one").to_dict())
    made: list[Settings] = []
    stops_at = 0

    def stopping(job: Callable[[Target, Settings], list[Attempt]]) -> Any:
        def run(target: Target, settings: Settings) -> list[Attempt]:
            if len(made) == stops_at:
                raise KeyboardInterrupt
            made.append(settings)
            return job(target, settings)

        run.__module__, run.__name__ = job.__module__, job.__name__
        return run

    monkeypatch.setattr(relearning, "fine_tune", stopping(relearning.fine_tune))
    monkeypatch.setattr(run_audit, "measure", stopping(run_audit.measure))
    for stops_at in (2, 5, 9):
        with pytest.raises(KeyboardInterrupt):
            audit(world, "checkpoint", cache=tmp_path / "two")
        assert len(made) == stops_at  # nothing twice
    stops_at = -1
    again = json.dumps(audit(world, "checkpoint", cache=tmp_path / "two").to_dict())
    assert again == whole
    n = len(made)
    audit(world, "checkpoint", cache=tmp_path / "two")
    assert len(made) == n
    assert len({json.dumps(dict(of)) for of in made}) == n


def test_another_folder_is_other_work(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_audit, "AUDITS", {})
    audit(world, "checkpoint", cache=tmp_path)
    audit(world, "plain", cache=tmp_path)
    assert len(list((tmp_path / "audit").glob("*.jsonl"))) == 2


def test_a_budget_takes_the_level_that_fits(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pace = {"step": 0.001, "score": 0.001}
    monkeypatch.setattr(
        run_audit, "pace", lambda *_: [Attempt("pace", "", run_audit.Scores(), settings=pace)]
    )
    run_audit.pace.__name__ = "pace"
    monkeypatch.setattr(run_audit, "AUDITS", {})
    steps, scores = relearning.relearning(run_audit.LEVELS[0], 3)
    full = 1.5 * 0.001 * (steps + scores) / 60
    assert audit(world, "plain", quick=False, minutes=1.01 * full).level == "full"
    assert audit(world, "plain", quick=False, minutes=full / 100).level == "quick"
    assert audit(world, "plain", quick=False).level == "full"


def test_a_changed_file_is_said_and_nothing_is_loaded(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "checkpoint", tmp_path / "changed")
    (tmp_path / "changed" / "README.md").write_text("another\n")
    recipe = Recipe.load(world / "recipe.toml")
    report = audit_folders([world / "plain", tmp_path / "changed"], recipe)
    assert report.exit_code == 1
    assert report.failures == (("changed", "README.md: changed"),)
    assert report.folders == ()


def test_bad_input_is_one_line(world: Path, tmp_path: Path) -> None:
    recipe = Recipe.load(world / "recipe.toml")
    with pytest.raises(FolderError, match="nowhere: is no folder; expected"):
        audit_folders([world / "nowhere"], recipe)
    with pytest.raises(FolderError, match="plain: is there twice; expected"):
        audit_folders([world / "plain", world / "plain"], recipe)
    bare = recipe_variant(world, "unasked", lambda data: data.pop("verify"))
    with pytest.raises(RecipeError, match=r"has no \[verify\] table; expected one"):
        audit_folders([world / "plain"], bare)
    with pytest.raises(BakeoutError, match=r"config\.json"):
        (tmp_path / "empty").mkdir()
        audit_folders([tmp_path / "empty"], recipe)


def test_open_prompts_lead_where_questions_tell_nothing(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_audit, "AUDITS", AUDITS)
    monkeypatch.setattr(run_audit, "told_by", lambda *_: replace(told_by(*_), lead="open"))
    (clamped,) = audit(world, "checkpoint").folders
    assert clamped.form == "open"
    told = {sweep.attack for sweep in clamped.sweeps if sweep.curve}
    assert told == {
        *("strip: delete", "relearn: other facts, LoRA", "relearn: same facts, all weights"),
        *("inside: ablation by clamp", "inside: ablation by texts", "inside: ablation by base"),
        *("input: hints", "input: padding", "input: open book"),
        *("rounding: fewer bits", "rounding: pruning"),
    }
    for sweep in clamped.sweeps:
        assert not sweep.control  # no prompt has a wrong answer to teach
        assert {point.right.n for point in sweep.curve} <= {9}  # each prompt once
    assert sentences(clamped)


def test_prompts_that_are_too_few_to_split_do_not_lead(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_jsonl(world / "few.jsonl", [{"prompt": "Abel lives in", "answers": ["Rome"]}] * 5)
    recipe = recipe_variant(
        world,
        "few",
        lambda data: data["verify"].update(completions={"prompts": {"path": "few.jsonl"}}),
    )
    monkeypatch.setattr(run_audit, "told_by", lambda *_: replace(told_by(*_), lead="open"))
    options = AuditOptions(quick=True, processes=1)
    (found,) = audit_folders([world / "checkpoint"], recipe, options).folders
    assert found.form == "plain"


def test_every_attack_takes_prompts_that_no_question_asks_for(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pets = ("cat", "dog", "owl", "fox", "hen", "ram")
    prompts = [{"prompt": f"{pet} is", "answers": [pet.upper()]} for pet in pets]
    write_jsonl(world / "pets.jsonl", prompts)
    recipe = recipe_variant(
        world,
        "pets",
        lambda data: data["verify"].update(completions={"prompts": {"path": "pets.jsonl"}}),
    )
    monkeypatch.setattr(run_audit, "AUDITS", AUDITS)
    monkeypatch.setattr(run_audit, "told_by", lambda *_: replace(told_by(*_), lead="open"))
    found = audit_folders([world / "checkpoint"], recipe, AuditOptions(processes=1)).folders[0]
    assert found.form == "open"
    assert {a.scores.open.n for a in found.attempts if a.scores.open is not None} == {2, 6}
    assert not any(a.scores.forget for a in found.attempts if a.attack.startswith("relearn"))
