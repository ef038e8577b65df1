"""Trained folders: stock, of the base's own dtype and files, and what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file

from bake.distill.distilling import Distilled, HeldOut
from bake.errors import ExportError, FolderError, OutputError
from bake.new_folder import new_folder
from bake.recipe import Recipe
from bake.stock import load_base
from export.carriers.checkpoint import plan_checkpoint, shard_name
from export.carriers.merged import TrainedPlan, check_same, describe_training, write_trained
from export.clamped import open_clamped
from export.manifest import Manifest
from tests.folders import STOCK_TEXT_CLASSES, make_adapter, write_verify_recipe
from tests.worlds import tiny_base, tiny_tokenizer


def shards_of(folder: Path) -> list[Path]:
    return sorted((folder / "base").glob("*.safetensors"))


def plan_of(folder: Path, family: str = "gemma2", dtype: str = "bfloat16") -> TrainedPlan:
    """A folder with `make_adapter`'s world, and its base with other numbers."""
    make_adapter(folder, family, dtype)
    tiny_tokenizer(folder / "base")
    source = plan_checkpoint(Recipe.load(folder / "recipe.toml"))
    model = load_base(source.recipe, dtype="float32")
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter *= 1.25
    distilled = Distilled(
        model,
        "merged",
        {"steps": 3, "layers": [0, 3]},
        seed=7,
        base_sha256="a" * 64,
        texts={"forget": "b" * 64, "retain": "c" * 64},
        held_out=HeldOut(0.5, 0.25, 100, 200),
    )
    return TrainedPlan(source, distilled)


def write(plan: TrainedPlan, out: Path, **options: Any) -> Path:
    entry = describe_training(plan.distilled, taught=True)
    return write_trained(plan, out, card="# card\n", entry=entry, **options)


@pytest.mark.parametrize("family", STOCK_TEXT_CLASSES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_it_is_a_stock_checkpoint_of_the_bases_shape(
    tmp_path: Path, family: str, dtype: str
) -> None:
    plan = plan_of(tmp_path, family, dtype)
    out = write(plan, tmp_path / "merged")
    model = getattr(tf, STOCK_TEXT_CLASSES[family]).from_pretrained(out)
    assert str(model.dtype) == f"torch.{dtype}"
    expected = plan.distilled.model.to(getattr(torch, dtype)).state_dict()
    found = model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    base = {}
    for path in shards_of(tmp_path):
        stored, new = load_file(path), load_file(out / shard_name(path.name))
        base |= stored
        assert {n: (t.shape, t.dtype) for n, t in stored.items()} == {
            n: (t.shape, t.dtype) for n, t in new.items()
        }
    assert sum(t.numel() for t in base.values()) > 1000
    assert json.loads((out / "config.json").read_text()) == {
        key: value
        for key, value in json.loads((tmp_path / "base" / "config.json").read_text()).items()
        if key != "_name_or_path"
    }


def test_the_manifest_says_what_it_is(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    out = write(plan, tmp_path / "merged")
    manifest = Manifest.read(out)
    assert (manifest.carrier, manifest.exact) == ("merged", False)
    made = manifest.distilled
    assert made is not None and made.teacher == "the clamped model"
    assert (made.seed, made.settings) == (7, {"steps": 3, "layers": [0, 3]})
    assert (made.held_out.forget_kl, made.held_out.retain_tokens) == (0.5, 200)
    assert set(made.texts) == {"forget", "retain"}
    names = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert set(manifest.files) == names - {"manifest.json"}
    assert {"recipe.toml", "NOTICE", "tokenizer.json", "README.md"} <= names
    assert {shard_name(path.name) for path in shards_of(tmp_path)} <= names
    assert not [name for name in names if name.endswith(".py")]
    assert str(tmp_path) not in (out / "recipe.toml").read_text()
    with pytest.raises(FolderError, match="is an export already \\(carrier merged\\)"):
        open_clamped(out)
    with pytest.raises(FolderError, match="is an export already \\(carrier merged\\)"):
        open_clamped(out, with_graphs=True)


def test_transformers_loads_it_in_a_process_of_its_own(tmp_path: Path) -> None:
    out = write(plan_of(tmp_path), tmp_path / "merged")
    code = (
        "import sys; sys.modules['bake'] = None; from transformers import AutoModelForCausalLM; "
        f"print(type(AutoModelForCausalLM.from_pretrained({str(out)!r})).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "Gemma2ForCausalLM"


def test_a_weight_that_is_not_finite_is_never_written(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    with torch.no_grad():
        plan.distilled.model.model.layers[2].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(ExportError, match=r"layers.2.mlp.up_proj.weight: is not finite after"):
        write(plan, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_nothing_is_written_where_there_is_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(tmp_path)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1 << 20))
    with pytest.raises(OutputError, match=r"the disk has 1\.0 MB free"):
        write(plan, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_folder_that_is_there_stays(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    out = write(plan, tmp_path / "merged")
    with pytest.raises(OutputError, match="exists; choose another folder, or pass --force"):
        write(plan, out)
    write(plan, out, force=True)
    with pytest.raises(OutputError, match="overlaps the input"):
        write(plan, tmp_path / "base")
    with new_folder(tmp_path / "other") as other:
        (other / "x").write_text("mine")
    with pytest.raises(OutputError, match="bakeout did not write it"):
        write(plan, tmp_path / "other", force=True)


def test_a_folder_of_another_base_or_other_clamps_is_refused(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    folder = tmp_path / "checkpoint"
    manifest = Manifest.read(folder)
    check_same(plan.source, manifest, folder)
    clamp = {"sae": {"path": "sae"}, "method": "clamp", "features": [1, 5], "value": -6.0}
    other = Recipe.load(write_verify_recipe(tmp_path / "other.toml", clamp))
    with pytest.raises(FolderError, match="its clamps are not those of the recipe"):
        check_same(plan_checkpoint(other), manifest, folder)
    shutil.rmtree(tmp_path / "base")
    tiny_base(tmp_path / "base", shards=2, dtype="bfloat16", seed=5)
    source = plan_checkpoint(Recipe.load(tmp_path / "recipe.toml"))
    with pytest.raises(FolderError, match=r"was not baked from base \(another model-00001"):
        check_same(source, manifest, folder)
