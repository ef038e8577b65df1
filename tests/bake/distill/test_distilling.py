"""Whole runs, of a few steps: every method, killed and gone on with, the same for the same seed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from bake.base import find_base
from bake.clamp import load_clamps
from bake.distill.distilling import Distilled, distill
from bake.distill.unlearners import UNLEARNERS
from bake.errors import DataError, ModelError, OutputError, RecipeError
from bake.recipe import Recipe
from bake.stock import load_base, load_tokenizer
from tests.folders import distill_world
from tests.worlds import tiny_base, tiny_tokenizer


class Killed(Exception):  # noqa: N818
    pass


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return distill_world(tmp_path_factory.mktemp("distilling"))


def run(world: Path, cache: Path, method: str = "merged", **given: Any) -> Distilled:
    recipe = Recipe.load(world / "recipe.toml")
    options = {key: given.pop(key) for key in ("seed", "progress") if key in given}
    table = recipe.distill_table.with_options(**given)
    recipe = recipe.model_copy(update={"distill": table})
    base = find_base(recipe)
    return distill(recipe, base, load_clamps(recipe, base), method=method, cache=cache, **options)


def tensors(distilled: Distilled) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = distilled.model.state_dict()
    return found


def same(one: Distilled, other: Distilled) -> bool:
    a, b = tensors(one), tensors(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("method", UNLEARNERS)
def test_every_method_makes_a_stock_model_of_the_bases_shape(
    world: Path, tmp_path: Path, method: str
) -> None:
    found = run(world, tmp_path, method)
    base = load_base(Recipe.load(world / "recipe.toml"), dtype="float32")
    assert type(found.model) is type(base) and found.method == method
    before, after = base.state_dict(), tensors(found)
    assert {n: t.shape for n, t in before.items()} == {n: t.shape for n, t in after.items()}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and not any("embed_tokens" in name for name in changed)
    if method in ("rmu", "sae-edit"):
        written = ("mlp.down_proj", "post_feedforward_layernorm")
        assert all(any(part in name for part in written) for name in changed)
    assert found.held_out.forget_kl > 0 and found.held_out.retain_kl > 0
    assert set(found.texts) == {"forget", "retain"}
    trains = UNLEARNERS[method].loss is not None
    assert found.settings.get("steps") == (3 if trains else None)
    assert not [*tmp_path.rglob("*.unfinished*")]


@pytest.mark.parametrize("student", ["full", "lora"])
@pytest.mark.parametrize("token_noise", [0.0, 0.5])
def test_training_brings_the_student_to_its_teachers(
    world: Path, tmp_path: Path, student: str, token_noise: float
) -> None:
    options = {"student": student, "rank": 8, "learning_rate": 3e-3}
    options |= {"token_noise": token_noise}
    before = run(world, tmp_path, steps=0, **options).held_out
    after = run(world, tmp_path, steps=40, **options).held_out
    assert after.forget_kl < 0.8 * before.forget_kl
    if not token_noise:
        assert before.retain_kl == pytest.approx(0, abs=1e-3)  # the base itself


def test_a_closed_form_is_a_result_of_its_own(world: Path, tmp_path: Path) -> None:
    found = run(world, tmp_path, student="full", start="least-squares", steps=0)
    base = load_base(Recipe.load(world / "recipe.toml"), dtype="float32").state_dict()
    changed = {name for name, t in tensors(found).items() if not torch.equal(t, base[name])}
    expected = {f"model.layers.{layer}.mlp.down_proj.weight" for layer in (1, 2, 3)}
    assert changed == expected  # the clamp sits behind layer 1
    untouched = run(world, tmp_path, student="full", steps=0)
    assert found.held_out.forget_kl < untouched.held_out.forget_kl


@pytest.mark.parametrize("student", ["disturbed", "lora"])
def test_a_killed_run_goes_on_to_the_same_tensors(
    world: Path, tmp_path: Path, student: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"student": student, "token_noise": 1.0, "steps": 6}
    monkeypatch.setattr("bake.search.cache.SAVING_SHARE", 1e9)  # every step is saved
    whole = run(world, tmp_path / "one", **options)

    def kill(what: str, share: float) -> None:
        if what == "train" and share > 0.4:
            raise Killed

    with pytest.raises(Killed):
        run(world, tmp_path / "other", **options, progress=kill)
    assert len([*(tmp_path / "other").rglob("*.unfinished.safetensors")]) == 1
    seen: list[float] = []

    def watch(what: str, share: float) -> None:
        if what == "train":
            seen.append(share)

    again = run(world, tmp_path / "other", **options, progress=watch)
    assert len(seen) == 3  # the other three steps had been taken
    assert same(whole, again) and whole.held_out == again.held_out


def test_the_seed_decides(world: Path, tmp_path: Path) -> None:
    one, two, other = (run(world, tmp_path / str(n), seed=n // 2) for n in range(3))
    assert same(one, two) and not same(one, other)
    assert one.held_out == two.held_out


def test_only_embeddings_of_the_topic_change(world: Path, tmp_path: Path) -> None:
    found = tensors(run(world, tmp_path, token_noise=1.0))["model.embed_tokens.weight"]
    recipe = Recipe.load(world / "recipe.toml")
    base = load_base(recipe, dtype="float32").get_input_embeddings().weight
    changed = (found != base).any(1).nonzero().flatten().tolist()
    assert load_tokenizer(recipe).convert_ids_to_tokens(changed) == ["x", "z"]  # of no retain text


def test_a_topic_without_tokens_of_its_own(world: Path, tmp_path: Path) -> None:
    source = {"path": str(world / "retain_texts.jsonl")}
    with pytest.raises(DataError, match=r"token_noise: every token of .* is in .* too"):
        run(world, tmp_path, token_noise=1.0, forget=source, retain=source)


def test_layers_outside_the_model(world: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"distill.layers: 1 to 4, but the model has 4 layers"):
        run(world, tmp_path, layers=[1, 4])


def test_a_base_with_images_is_refused(world: Path, tmp_path: Path) -> None:
    folder = tmp_path / "world"
    shutil.copytree(world, folder)
    shutil.rmtree(folder / "base")
    tiny_tokenizer(tiny_base(folder / "base", "gemma3"))
    with pytest.raises(ModelError, match="takes images; only text models are distilled"):
        run(folder, tmp_path / "cache")


def test_no_room_for_what_teachers_say(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1 << 20))
    with pytest.raises(OutputError, match=r"needs 0\.1 MB, the disk has 1\.0 MB free"):
        run(world, tmp_path / "cache")
    assert not [*tmp_path.rglob("*.safetensors")]
