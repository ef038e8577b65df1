"""Whose word a verification takes: the user's recipe, the folder's own, or nobody's; and what it
then says that it cannot know.
"""

from __future__ import annotations

import json
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from bake.base import find_base
from bake.errors import DataError, RecipeError
from bake.questions.multiple_choice import load_questions
from bake.recipe import Recipe
from bake.stock import location
from bakeout.cli import run
from bakeout.verbs.selecting import select_anew
from export.carriers.checkpoint import plan_checkpoint, write_checkpoint
from tests.engines import InProcess
from tests.folders import baked_world
from tests.reports import full_report
from tests.worlds import tiny_base, write_questions, write_texts
from verify.clamped_folder import downloads_of, own_recipe
from verify.options import Options
from verify.page.html import write_html
from verify.report.findings import CLAIMED, EngineReport, Failure
from verify.report.intervals import McNemar, mcnemar
from verify.report.measures import AnswerSet, Share
from verify.report.reading import report_from_dict
from verify.run import verify_folder
from verify.tolerances import forgetting_failures, remembering_failures

ONLY = frozenset({"integrity"})
HUB = {
    "schema": 1,
    "base": {"model": "google/gemma-2-2b"},
    "clamp": [
        {
            "sae": {"release": "gemma-scope-2b-pt-res-canonical", "id": "layer_7/width_16k"},
            "method": "zero",
            "features": [1],
        }
    ],
    "verify": {
        "forget_questions": {"dataset": "cais/wmdp"},
        "retain_questions": {"dataset": "cais/mmlu"},
        "text": {"dataset": "some/text"},
    },
}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world with `select.toml`, whose features are to be selected, and `selected/`, baked from
    the ones that are; `checkpoint/` is baked from others.
    """
    folder = baked_world(tmp_path_factory.mktemp("work"), [1, 5, 9])
    data = tomllib.loads((folder / "recipe.toml").read_text())
    data["clamp"][0]["features"] = "select"
    for side, seed in (("a", 3), ("b", 4)):
        write_texts(folder / f"{side}.jsonl", 12, seed=seed)
    data["select"] = {
        **{side: {"path": f"{file}.jsonl"} for side, file in (("forget", "a"), ("retain", "b"))},
        **{"retain_threshold": 1.0, "n_features": 3, "seq_len": 32, "n_seqs": 8},
    }
    (folder / "select.toml").write_text(tomli_w.dumps(data))
    return folder


@pytest.fixture
def recipe(work: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.setenv("BAKEOUT_CACHE", str(work / "cache"))
    return Recipe.load(work / "select.toml")


# --------------------------------------------------------------------------- features


def test_features_are_selected_anew_and_others_fail(
    work: Path, recipe: Recipe, tmp_path: Path
) -> None:
    from bake.search.selection import selected_recipe

    chosen, _ = selected_recipe(recipe)
    (clamp,) = chosen.clamp
    assert isinstance(clamp.features, list)
    turned = chosen.with_clamps([clamp.model_copy(update={"features": clamp.features[::-1]})])
    for n, honest in enumerate((chosen, turned)):  # the order is no forgery
        folder = write_checkpoint(plan_checkpoint(honest), tmp_path / str(n), card="")
        report = verify_folder(folder, recipe, ONLY, select=select_anew)
        assert (report.verdict, report.scope, report.cannot_know) == ("pass", "integrity", None)
    assert set(clamp.features) != {1, 5, 9}
    report = verify_folder(work / "checkpoint", recipe, ONLY, select=select_anew)
    assert report.verdict == "fail" and report.scope == "integrity"
    assert "features is [1, 5, 9], expected" in str(report.failures[0])


def test_where_nobody_selects_the_scope_says_whose_features_they_are(
    work: Path, recipe: Recipe
) -> None:
    gone = recipe.model_copy(
        update={
            "select": recipe.select
            and recipe.select.model_copy(
                update={"forget": recipe.select.forget.model_copy(update={"path": "gone.jsonl"})}
            )
        }
    )
    gone._folder = recipe.folder
    for asked, select in ((recipe, None), (gone, select_anew)):
        report = verify_folder(work / "checkpoint", asked, ONLY, select=select)
        assert (report.verdict, report.scope) == ("pass", f"integrity{CLAIMED}")
        assert report.cannot_know is not None and "the folder names" in report.cannot_know


def test_the_command_selects_and_may_be_told_not_to(
    work: Path, recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["verify", str(work / "checkpoint"), "--recipe", str(work / "select.toml")]
    asked += ["--only", "integrity"]
    assert run(asked) == 1
    capsys.readouterr()
    assert run([*asked, "--features-as-claimed"]) == 0
    out = capsys.readouterr().out
    assert "this run cannot know" in out and "features as the folder claims" in " ".join(
        out.split()
    )


def test_what_forgets_nothing_fails_where_the_folder_chose(
    work: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("verify.engines.engines.TorchRunner", InProcess)
    report = verify_folder(work / "checkpoint", recipe, frozenset({"choices"}))
    assert {(f.kind, f.engine) for f in report.failures} == {("forgetting", "checkpoint")}
    named = Recipe.load(work / "recipe.toml")
    assert not verify_folder(work / "checkpoint", named, frozenset({"choices"})).failures


def answered(change: McNemar) -> EngineReport:
    share = Share(0, 10)
    sets = AnswerSet("forget", "chat", share, None, (0, 0, 0, 0), None, (), change, None)
    return EngineReport("checkpoint", answers=(sets,))


def failures_of(lost: int, gained: int) -> list[Failure]:
    before = [True] * lost + [False] * gained + [True] * 5
    after = [False] * lost + [True] * gained + [True] * 5
    return list(forgetting_failures(answered(mcnemar(before, after)), "chat"))


def test_forgetting_is_told_from_chance() -> None:
    assert not failures_of(6, 0) and not failures_of(20, 5)
    for lost, gained in ((0, 0), (5, 0), (0, 20), (10, 8)):
        assert [f.kind for f in failures_of(lost, gained)] == ["forgetting"]


def test_trained_weights_have_to_forget_where_the_hook_does() -> None:
    def change(lost: int) -> McNemar:
        return mcnemar([True] * 20, [False] * lost + [True] * (20 - lost))

    def failing(engine: int, reference: int, **asked: bool) -> list[str]:
        engines = (
            replace(answered(change(reference)), name="reference"),
            replace(answered(change(engine)), name="rmu"),
        )
        report = replace(full_report(), engines=engines, prompt="chat")
        return [failure.engine for failure in remembering_failures(report, **asked)]

    assert failing(2, 15, trained=True, claimed=False) == ["rmu"]
    assert failing(12, 15, trained=True, claimed=False) == []
    assert failing(2, 2, trained=True, claimed=False) == []  # nobody can tell
    assert failing(2, 15, trained=False, claimed=False) == []
    assert failing(2, 2, trained=False, claimed=True) == ["rmu"]


# --------------------------------------------------------------------------- the folder's recipe


@pytest.fixture
def shadowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose recipe names the hub, with folders of those names in it; one is in it."""
    (tmp_path / "recipe.toml").write_text(tomli_w.dumps(HUB))
    tiny_base(tmp_path / "google" / "gemma-2-2b")
    write_questions(tmp_path / "cais" / "wmdp" / "test.jsonl", 2)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_folder_does_not_stand_in_for_the_hub(
    shadowed: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    snapshot = tiny_base(tmp_path_factory.mktemp("hub") / "snapshot")

    def download(model: str, revision: str) -> Path:
        asked.append(model)
        return snapshot

    monkeypatch.setattr("bake.base._download", download)
    recipe = own_recipe(shadowed)
    assert recipe is not None
    assert find_base(recipe).folder == snapshot
    assert location(recipe) == {
        "pretrained_model_name_or_path": str(snapshot),
        "local_files_only": True,
    }
    assert asked == ["google/gemma-2-2b"] * 2
    assert recipe.verify is not None and not recipe.local_sources
    with pytest.raises(DataError, match="the current folder holds a cais/wmdp too"):
        load_questions(recipe.verify.forget_questions, recipe)


def test_nothing_is_downloaded_unasked(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = Recipe.parse(HUB, name="test", folder=Path())
    assert downloads_of(recipe) == [
        "google/gemma-2-2b at main",
        "SAE gemma-scope-2b-pt-res-canonical/layer_7/width_16k",
        *("data set cais/wmdp", "data set cais/mmlu", "data set some/text"),
    ]
    monkeypatch.setattr("bakeout.verbs.verifying.own_recipe", lambda _: recipe)
    monkeypatch.setenv("HF_HUB_OFFLINE", "false")
    folder = str(work / "checkpoint")
    assert run(["verify", folder]) == 2
    said = capsys.readouterr().err
    assert "would download google/gemma-2-2b at main, SAE " in said and "expected --yes" in said
    assert run(["verify", folder, "--only", "integrity"]) == 0  # needs none of it
    followed: list[bool] = []

    def verify(*arguments: Any, **_: Any) -> Any:
        followed.append(arguments[4].own_recipe)
        return verify_folder(work / "checkpoint", only=ONLY)

    monkeypatch.setattr("bakeout.verbs.verifying.verify_folder", verify)
    assert run(["verify", folder, "--yes"]) == 0
    for answer in (True, False):
        monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
        monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
        monkeypatch.setattr("typer.confirm", lambda *_, answer=answer, **__: answer)
        assert run(["verify", folder]) == 0
    assert followed == [True, True, False]


def test_a_recipe_that_may_not_be_followed_is_not(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(_: Path) -> Recipe:
        raise AssertionError("the folder's own recipe may not be followed")

    monkeypatch.setattr("verify.run.own_recipe", never)
    report = verify_folder(work / "checkpoint", options=Options(own_recipe=False))
    assert report.scope == "integrity"
    with pytest.raises(RecipeError, match="may not be followed"):
        verify_folder(
            work / "checkpoint", only=frozenset({"loss"}), options=Options(own_recipe=False)
        )


# --------------------------------------------------------------------------- what it says


def test_a_run_without_a_recipe_says_what_it_cannot_know(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, page = tmp_path / "report.json", tmp_path / "report.html"
    assert run(["verify", str(work / "checkpoint"), "--json", str(file), "--html", str(page)]) == 0
    said = json.loads(file.read_text())["cannot_know"]
    assert said.startswith("Without a recipe this run cannot know whether the clamp is an SAE's")
    assert said in " ".join(capsys.readouterr().out.split())
    assert said.replace("'", "&#39;") in page.read_text()
    assert report_from_dict(json.loads(file.read_text())).cannot_know == said
    named = Recipe.load(work / "recipe.toml")
    report = verify_folder(work / "checkpoint", named, ONLY)
    assert report.cannot_know is None
    write_html(report, work / "checkpoint", page)
    assert "cannot know" not in page.read_text()


def test_a_run_without_integrity_says_what_it_cannot_know(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("verify.engines.engines.TorchRunner", InProcess)
    recipe = Recipe.load(work / "recipe.toml")
    for kinds, knows in (({"loss"}, False), ({"loss", "integrity"}, True)):
        report = verify_folder(work / "checkpoint", recipe, frozenset(kinds))
        assert (report.cannot_know is None) == knows
        assert knows or str(report.cannot_know).startswith("Without integrity this run cannot know")
