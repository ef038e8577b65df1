"""A whole verification of a tiny checkpoint, and defects planted in it."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

from bake.errors import BakeoutError, FolderError, OutputError, RecipeError
from bake.recipe import Recipe
from bake.search.cache import cache_folder
from bakeout.cli import run
from export.carriers.checkpoint import plan_checkpoint, write_checkpoint
from tests.defects import rewrite_file
from tests.engines import InProcess
from tests.folders import N_FORGET, N_RETAIN, baked_world, recipe_variant
from tests.worlds import save_sae_lens, tiny_sae
from verify.evidence.kinds import KindError
from verify.evidence.tasks.harness_tasks import HarnessError
from verify.options import Options
from verify.report.findings import VerifyReport
from verify.report.reading import check_fresh, report_from_dict
from verify.run import verify_folder


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, an SAE, questions, text, `recipe.toml` and the baked `checkpoint/`."""
    return baked_world(tmp_path_factory.mktemp("work"), [1, 5, 9])


@pytest.fixture(scope="module")
def report(work: Path) -> VerifyReport:
    stages: list[tuple[str, float]] = []
    recipe = Recipe.load(work / "recipe.toml")
    found = verify_folder(
        work / "checkpoint", recipe, progress=lambda stage, share: stages.append((stage, share))
    )
    hashed = [share for stage, share in stages if stage == "hash"]
    assert hashed == sorted(hashed) and hashed[-1] == 1.0
    begun = [stage for stage, _ in stages].index("rounding")
    assert {stage for stage, _ in stages[:begun]} == {"hash", "load"}
    shares = [share for _, share in stages[begun:]]
    assert shares == sorted(shares) and shares[-1] == pytest.approx(1.0)
    return found


def test_a_good_checkpoint_passes_in_full(report: VerifyReport) -> None:
    assert report.failures == ()
    assert (report.verdict, report.scope, report.dtype) == ("pass", "full", "float32")
    assert (report.folder, report.carrier, report.exact) == ("checkpoint", "layer", True)
    assert report.prompt == "plain"
    assert [engine.name for engine in report.engines] == ["base", "reference", "checkpoint"]
    assert report.items is not None
    assert report.items.forget_questions == N_FORGET
    assert report.items.retain_questions == N_RETAIN


def test_the_clamp_fired_and_moved_the_model(report: VerifyReport) -> None:
    base, reference, checkpoint = report.engines
    assert base.parity is not None and reference.parity is not None
    assert checkpoint.parity is not None
    assert checkpoint.parity.tokens_fired == reference.parity.tokens_fired > 0
    assert report.fired_by_layer == ((1, reference.parity.tokens_fired),)
    assert base.parity.tokens_fired == 0
    assert base.parity.max_abs_logit > 1000 * checkpoint.parity.max_abs_logit
    assert checkpoint.parity.max_abs_logit <= 1e-4
    # What is read token by token comes on top.
    assert checkpoint.parity.tokens_compared > base.parity.tokens_compared > 1000
    assert base.loss_added == 0.0
    assert reference.loss_added == pytest.approx(checkpoint.loss_added, abs=1e-6)
    assert reference.loss_added != 0.0
    assert reference.forget == checkpoint.forget


def test_it_names_the_manifest_and_shows_where_the_clamp_fired(
    report: VerifyReport, work: Path
) -> None:
    manifest = (work / "checkpoint" / "manifest.json").read_bytes()
    assert report.manifest_sha256 == hashlib.sha256(manifest).hexdigest()
    check_fresh(report, work / "checkpoint")
    assert report_from_dict(json.loads(json.dumps(report.to_dict()))) == report
    assert {example.source for example in report.examples} == {"forget", "retain", "text"}
    for example in report.examples:
        assert example.tokens[0] == "<bos>" and 0 not in example.fired
        assert example.form == ("text" if example.source == "text" else "plain")
        assert set(example.fired) <= set(range(len(example.tokens)))
    assert report.examples[0].fired


def test_json_has_both_prompt_forms_and_no_path(report: VerifyReport, work: Path) -> None:
    text = json.dumps(report.to_dict(), allow_nan=False)
    assert str(work) not in text
    for engine in report.to_dict()["engines"].values():
        assert set(engine["forget"]) == set(engine["retain"]) == {"plain", "chat"}


# --------------------------------------------------------------------------- defects and parts


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("verify.engines.engines.TorchRunner", InProcess)


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("kind", ["choices", "loss"])
def test_a_part_measures_what_the_whole_does(kind: str, work: Path, report: VerifyReport) -> None:
    recipe = Recipe.load(work / "recipe.toml")
    found = verify_folder(work / "checkpoint", recipe, only=frozenset({kind}))
    assert (found.verdict, found.scope) == ("pass", kind)
    for part, whole in zip(found.engines, report.engines, strict=True):
        assert part.parity is None
        if kind == "choices":
            assert (part.forget, part.retain) == (whole.forget, whole.retain)
            assert [of.share for of in part.answers] == [of.share for of in whole.answers]
            assert (part.loss, part.alignment) == (None, whole.alignment)
        else:
            assert part.forget is part.retain is None
            assert part.loss == pytest.approx(whole.loss, abs=1e-5)
            assert part.loss_added == pytest.approx(whole.loss_added, abs=1e-5)


@pytest.mark.usefixtures("in_process")
def test_the_harness_scores_every_engine_and_its_results_are_kept(
    work: Path, report: VerifyReport, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe, evals = Recipe.load(work / "recipe.toml"), tmp_path / "new" / "evals"
    options = Options(tasks=("local",), evals=evals)
    found = verify_folder(work / "checkpoint", recipe, frozenset({"choices"}), options=options)
    for engine, whole in zip(found.engines, report.engines, strict=True):
        assert whole.forget is not None and whole.retain is not None
        scores = {score.task: score for score in engine.harness}
        assert scores["forget"].accuracy == pytest.approx(whole.forget.plain)
        assert scores["retain"].accuracy == pytest.approx(whole.retain.plain)
        assert (scores["forget"].n, scores["retain"].n) == (N_FORGET, N_RETAIN)
        kept = json.loads((evals / f"{engine.name}-local.json").read_text())
        assert kept["results"]["forget"]["acc,none"] == scores["forget"].accuracy
        assert {"configs", "versions", "n-samples", "config"} <= set(kept)
    assert sorted(path.name for path in (evals / "tasks").glob("*.yaml")) == [
        "forget.yaml",
        "retain.yaml",
    ]
    drawn = capfd.readouterr().err
    assert "examples/s" not in drawn and f"/{N_FORGET} [" not in drawn
    assert report_from_dict(json.loads(json.dumps(found.to_dict()))) == found


@pytest.mark.usefixtures("in_process")
def test_a_task_that_there_is_not_is_named(work: Path, tmp_path: Path) -> None:
    recipe = Recipe.load(work / "recipe.toml")
    options = Options(tasks=("no_such_task",), evals=tmp_path)
    with pytest.raises(HarnessError, match="no_such_task"):
        verify_folder(work / "checkpoint", recipe, frozenset({"choices"}), options=options)
    with pytest.raises(RecipeError, match="local: the reference is rebuilt from a recipe"):
        verify_folder(work / "checkpoint", options=Options(tasks=("local",)))


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize(
    ("change", "options", "reason"),
    [
        ({"reworded": {"x": {"path": "none.jsonl"}}}, Options(), "none.jsonl: cannot be read"),
        ({"completions": {"prompts": {"path": "forget.jsonl"}}}, Options(), "has no `prompt`"),
        ({}, Options(tasks=("no_such_task",)), "no_such_task: there is none"),
        ({}, Options(tasks=("local",), evals=Path(__file__)), "cannot be written"),
    ],
)
def test_what_only_the_end_needs_is_checked_before_anything_is_loaded(
    work: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, Any],
    options: Options,
    reason: str,
) -> None:
    monkeypatch.setattr("verify.gather.load_hooked", None)
    recipe = recipe_variant(work, "early", lambda data: data["verify"].update(change))
    with pytest.raises(BakeoutError, match=reason):
        verify_folder(work / "checkpoint", recipe, options=options)


@pytest.mark.usefixtures("in_process")
def test_a_clamp_that_differs_is_caught_with_its_worst_item(work: Path) -> None:
    folder = work / "differs"
    shutil.copytree(work / "checkpoint", folder)
    (shard,) = folder.glob("*sae-clamp*.safetensors")
    tensors = load_file(shard)
    tensors["model.layers.1.sae_clamp.value"][1] += 0.05
    save_file(tensors, shard, metadata={"format": "pt"})
    rewrite_file(folder, shard.name, shard.read_bytes())
    recipe = Recipe.load(work / "recipe.toml")
    (file,) = verify_folder(folder, recipe, only=frozenset({"integrity"})).failures
    assert f"{shard.name}: value at layer 1 is not the recipe's: [1] is -5.9499" in file.what
    found = verify_folder(folder, recipe, only=frozenset({"parity"}))
    assert (found.verdict, found.scope) == ("fail", "parity")
    assert found.failures[0].kind == "parity"
    assert found.failures[0].what == "max_abs_logit"
    assert "row" in str(found.failures[0])
    checkpoint = found.engine("checkpoint")
    assert checkpoint is not None and checkpoint.parity is not None
    assert checkpoint.parity.worst is not None
    assert checkpoint.parity.worst.abs_logit == checkpoint.parity.max_abs_logit > 1e-4
    assert checkpoint.forget is None and checkpoint.loss is None


@pytest.mark.usefixtures("in_process")
def test_a_clamp_that_never_fires_is_a_failure_not_a_pass(work: Path) -> None:
    def silence(data: dict[str, Any]) -> None:
        data["clamp"][0]["trigger"] = 1e6

    recipe = recipe_variant(work, "silent", silence)
    folder = work / "silent"
    write_checkpoint(plan_checkpoint(recipe), folder, card="# card\n")
    found = verify_folder(folder, recipe)
    assert [(f.what, f.measured) for f in found.failures] == [("tokens_fired at layer 1", 0)]
    reference, checkpoint = found.engine("reference"), found.engine("checkpoint")
    assert reference is not None and checkpoint is not None and checkpoint.parity is not None
    assert reference.loss_added == 0.0
    assert checkpoint.parity.max_abs_logit <= 1e-5
    assert found.warnings == ("layer 1: never active on the forget questions: feature 1, 5, 9",)


@pytest.mark.usefixtures("in_process")
def test_a_feature_that_fires_on_the_forget_corpus_only_is_no_warning(work: Path) -> None:
    def one_rare_feature(data: dict[str, Any]) -> None:
        data["clamp"][0]["features"] = list(range(64))
        data["clamp"][0]["trigger"] = 6.0
        corpus = {"path": "text.jsonl"}
        data["select"] = {"forget": corpus, "retain": corpus}

    def without_corpus(data: dict[str, Any]) -> None:
        one_rare_feature(data)
        del data["select"]

    silent = []
    for name, change in (("with", one_rare_feature), ("without", without_corpus)):
        recipe = recipe_variant(work, name, change)
        write_checkpoint(plan_checkpoint(recipe), work / name, card="# card\n")
        found = verify_folder(work / name, recipe)
        assert all(("forget corpus" in w) == (name == "with") for w in found.warnings)
        silent.append({f for w in found.warnings for f in w.split("feature ")[1].split(", ")})
    assert silent[0] < silent[1]


@pytest.mark.usefixtures("in_process")
def test_bfloat16_is_held_to_its_own_bar(work: Path) -> None:
    recipe = recipe_variant(work, "bf16", lambda data: data["base"].update(dtype="bfloat16"))
    folder = work / "bf16"
    write_checkpoint(plan_checkpoint(recipe), folder, card="# card\n")
    found = verify_folder(folder, recipe, only=frozenset({"parity"}))
    assert (found.dtype, found.scope) == ("bfloat16", "parity")
    checkpoint = found.engine("checkpoint")
    assert checkpoint is not None and checkpoint.parity is not None
    assert checkpoint.parity.mean_kl <= 1e-3
    assert checkpoint.parity.tokens_fired > 0
    assert found.verdict == "pass"


# --------------------------------------------------------------------------- nothing is executed


@pytest.fixture
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("nothing from the folder may run")

    monkeypatch.setattr("verify.engines.engines.TorchRunner", refuse)


@pytest.mark.usefixtures("nothing_runs")
def test_another_modeling_file_ends_the_verification(work: Path) -> None:
    folder = work / "tampered"
    shutil.copytree(work / "checkpoint", folder)
    with (folder / "modeling_clamped_gemma.py").open("a") as file:
        file.write("\n")
    found = verify_folder(folder, Recipe.load(work / "recipe.toml"))
    assert (found.verdict, found.scope, found.engines) == ("fail", "integrity", ())
    (failure,) = found.failures
    assert failure.kind == "integrity"
    assert failure.what.startswith("modeling_clamped_gemma.py: is none that a released bakeout")


@pytest.mark.usefixtures("nothing_runs")
def test_a_changed_byte_ends_the_verification(work: Path) -> None:
    folder = work / "changed"
    shutil.copytree(work / "checkpoint", folder)
    with (folder / "recipe.toml").open("a") as file:
        file.write("\n")
    found = verify_folder(folder, Recipe.load(work / "recipe.toml"))
    assert (found.verdict, found.scope, found.engines) == ("fail", "integrity", ())
    assert [f.what for f in found.failures] == ["recipe.toml: changed"]


@pytest.mark.usefixtures("nothing_runs")
def test_without_a_recipe_local_sources_leave_integrity_alone(work: Path) -> None:
    found = verify_folder(work / "checkpoint")
    assert (found.verdict, found.scope, found.engines) == ("pass", "integrity", ())
    with pytest.raises(RecipeError, match="give the recipe with --recipe"):
        verify_folder(work / "checkpoint", only=frozenset({"integrity", "loss"}))


@pytest.mark.usefixtures("nothing_runs")
def test_bad_requests_are_one_line(work: Path, tmp_path: Path) -> None:
    recipe = Recipe.load(work / "recipe.toml")
    two = recipe_variant(work, "two", lambda data: data["clamp"].append(data["clamp"][0]))
    merged = tmp_path / "merged"
    shutil.copytree(work / "checkpoint", merged)
    manifest = json.loads((merged / "manifest.json").read_text())
    (merged / "manifest.json").write_text(json.dumps({**manifest, "carrier": "woven"}))
    cases: list[tuple[type[BakeoutError], str, Path, Recipe | None, set[str]]] = [
        (KindError, '"parties"; expected .* did you mean parity?', work, recipe, {"parties"}),
        (FolderError, "has no manifest.json", work, recipe, set()),
        (RecipeError, "the recipe has 2 clamps", work / "checkpoint", two, set()),
        (FolderError, "carries the clamp as woven", merged, recipe, {"parity"}),
        (FolderError, "carries the clamp as woven", merged, None, {"witnesses"}),
    ]
    for kind, message, folder, given, only in cases:
        with pytest.raises(kind, match=message) as caught:
            verify_folder(folder, given, only=frozenset(only))
        assert "\n" not in str(caught.value)


def test_another_layer_is_refused_before_the_folder_is_run(work: Path) -> None:
    def move(data: dict[str, Any]) -> None:
        data["clamp"][0]["sae"]["path"] = "sae2"

    save_sae_lens(work / "sae2", tiny_sae(), layer=2)
    with pytest.raises(RecipeError, match="the recipe clamps layers 2, checkpoint layers 1"):
        verify_folder(work / "checkpoint", recipe_variant(work, "moved", move))


def test_without_a_home_nothing_is_kept(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("BAKEOUT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", none)
    recipe = str(work / "recipe.toml")
    asked = ["verify", str(work / "checkpoint"), "--recipe", recipe, "--only", "integrity"]
    assert run(asked) == 0
    with pytest.raises(OutputError, match="expected HOME, or BAKEOUT_CACHE"):
        cache_folder()
