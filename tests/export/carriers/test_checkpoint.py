"""The checkpoint folder: what is in it, byte for byte, and that nothing local leaks."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from bake import modeling_clamped_gemma as clamped
from bake.errors import OutputError
from bake.recipe import Recipe
from bakeout.cli import run
from bakeout.verbs.baking import bake_recipe
from export.carriers import checkpoint
from export.clamped import GUARD
from tests.worlds import KINDS, RecipeWriter, save_sae_lens, tiny_base, tiny_sae

TABLE = {"sae": {"path": "sae"}, "method": "clamp", "features": [9, 2], "value": -6.0}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("family", KINDS)
@pytest.mark.parametrize("shards", [1, 3])
def test_base_shards_byte_for_byte_and_the_clamp_beside_them(
    tmp_path: Path, write_recipe: RecipeWriter, family: str, shards: int
) -> None:
    base = tiny_base(tmp_path / "base", family, shards=shards, dtype="bfloat16")
    save_sae_lens(tmp_path / "sae", tiny_sae())
    for name in ("tokenizer.json", "chat_template.jinja", "special_tokens_map.json"):
        (base / name).write_text(f"{name} of the base")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tools.jinja").write_text("tools")
    (base / "pytorch_model.bin").write_text("not to be copied")
    bake_recipe(write_recipe(TABLE), tmp_path / "out", force=False)
    out = tmp_path / "out"

    shard_names = {path.name for path in base.glob("*.safetensors")}
    new_names = {path.name for path in out.glob("*.safetensors")} - {checkpoint.CLAMP_SHARD}
    assert {sha256(base / n) for n in shard_names} == {sha256(out / n) for n in new_names}
    assert "model.safetensors" not in new_names
    companions = [
        "tokenizer.json",
        "chat_template.jinja",
        "special_tokens_map.json",
        "generation_config.json",
        "additional_chat_templates/tools.jinja",
    ]
    assert all((out / name).read_bytes() == (base / name).read_bytes() for name in companions)
    assert not (out / "pytorch_model.bin").exists()

    manifest = json.loads((out / "manifest.json").read_text())
    present = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    assert set(manifest["files"]) == present - {"manifest.json"}
    assert all(sha256(out / name) == digest for name, digest in manifest["files"].items())
    assert manifest["exact"] is True and manifest["carrier"] == "layer"
    assert manifest["clamps"][0]["sae"]["sha256"] == sha256(
        tmp_path / "sae" / "sae_weights.safetensors"
    )

    index = json.loads((out / "model.safetensors.index.json").read_text())
    for name in new_names | {checkpoint.CLAMP_SHARD}:
        keys = set(load_keys(out / name))
        assert keys == {key for key, file in index["weight_map"].items() if file == name}
    section = json.loads((out / "config.json").read_text())["sae_clamp"]
    assert section == {
        "schema": 1,
        "sites": [{"layer": 1, "k": 2, "exempt_bos": True}],
        "exempt_token_ids": [2],
    }


def load_keys(path: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return list(file.keys())


def test_clamp_tensors_are_the_folded_slice(tmp_path: Path, write_recipe: RecipeWriter) -> None:
    tiny_base(tmp_path / "base")
    sae = tiny_sae()
    save_sae_lens(tmp_path / "sae", sae)
    bake_recipe(write_recipe({**TABLE, "trigger": 0.25}), tmp_path / "out", force=False)
    tensors = load_file(tmp_path / "out" / checkpoint.CLAMP_SHARD)
    got = {key.removeprefix("model.layers.1.sae_clamp."): t for key, t in tensors.items()}
    f = [9, 2]
    b_enc = sae.b_enc[f] - sae.b_dec.astype("f8") @ sae.W_enc[:, f].astype("f8")
    expected = {
        "W_enc": sae.W_enc[:, f],
        "b_enc": b_enc.astype("f4"),
        "theta": sae.threshold[f],
        "W_dec": sae.W_dec[f],
        "trigger": np.full(2, 0.25, "f4"),
        "route": np.eye(2, dtype=bool),
        "value": np.full(2, -6, "f4"),
        "scale": np.zeros(2, "f4"),
    }
    assert set(got) == set(expected)
    for name, array in expected.items():
        assert got[name].dtype == array.dtype
        assert np.allclose(got[name], array, atol=1e-6), name


def test_nothing_in_the_folder_names_this_machine(
    tmp_path: Path, write_recipe: RecipeWriter
) -> None:
    tiny_base(tmp_path / "base")
    save_sae_lens(tmp_path / "sae", tiny_sae())
    (tmp_path / "q.jsonl").write_text("{}\n")
    source = {"path": str(tmp_path / "q.jsonl")}
    recipe = write_recipe(
        {**TABLE, "sae": {"path": str(tmp_path / "sae")}},
        base={"model": str(tmp_path / "base")},
        verify={"forget_questions": source, "retain_questions": source, "text": source},
    )
    bake_recipe(recipe, tmp_path / "out", force=False)
    for path in (tmp_path / "out").rglob("*"):
        if path.is_file():
            assert str(tmp_path.parent).encode() not in path.read_bytes(), path.name
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["sources"]["q.jsonl"] == sha256(tmp_path / "q.jsonl")
    assert Recipe.load(tmp_path / "out" / "recipe.toml").base.model == "base"


def test_same_input_same_bytes(tmp_path: Path, write_recipe: RecipeWriter) -> None:
    tiny_base(tmp_path / "base")
    save_sae_lens(tmp_path / "sae", tiny_sae())
    recipe = write_recipe(TABLE)
    for name in ("one", "two"):
        bake_recipe(recipe, tmp_path / name, force=False)
    one, two = ((tmp_path / name / "manifest.json").read_bytes() for name in ("one", "two"))
    assert one == two


@pytest.mark.parametrize("license_id", ["gemma", "apache-2.0"])
def test_notice_and_card_follow_the_licence(
    tmp_path: Path, write_recipe: RecipeWriter, license_id: str
) -> None:
    tiny_base(tmp_path / "base")
    save_sae_lens(tmp_path / "sae", tiny_sae())
    recipe = write_recipe(TABLE, base={"license": license_id})
    bake_recipe(recipe, tmp_path / "out", force=False)
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"license: {license_id}\n" in card
    assert (tmp_path / "out" / "NOTICE").exists() == (license_id == "gemma")
    assert ("Gemma Terms of Use" in card) == (license_id == "gemma")


def test_recipe_dtype_is_what_the_checkpoint_loads_in(
    tmp_path: Path, write_recipe: RecipeWriter
) -> None:
    tiny_base(tmp_path / "base")
    save_sae_lens(tmp_path / "sae", tiny_sae())
    bake_recipe(write_recipe(TABLE, base={"dtype": "bfloat16"}), tmp_path / "out", force=False)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    name = "model.safetensors"
    renamed = tmp_path / "out" / checkpoint.RENAMED_WEIGHTS
    assert sha256(tmp_path / "base" / name) == sha256(renamed)


def test_guard_is_the_one_that_the_modeling_file_takes_off() -> None:
    assert GUARD == clamped.GUARD


def test_sae_that_spoils_midway_leaves_nothing(
    tmp_path: Path, write_recipe: RecipeWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_base(tmp_path / "base")
    save_sae_lens(tmp_path / "sae", tiny_sae())
    recipe = write_recipe(TABLE)
    before = sorted(p.name for p in tmp_path.iterdir())

    def full(*_: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("export.copying.os.write", full)
    with pytest.raises(OutputError, match="disk is full"):
        bake_recipe(recipe, tmp_path / "out", force=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_a_base_brings_text_and_licences_and_no_code_nor_what_its_links_lead_to(
    tmp_path: Path, write_recipe: RecipeWriter, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tiny_base(tmp_path / "base")
    save_sae_lens(tmp_path / "sae", tiny_sae())
    for name in ("tokenizer.py", "tokenizer.bin", "LICENSE.py", "chat_template.so", "LICENSE.txt"):
        (base / name).write_text(name)
    (tmp_path / "key").write_text("PRIVATE KEY")
    (base / "NOTICE").symlink_to(tmp_path / "key")
    recipe = write_recipe(TABLE)
    assert run(["bake", str(recipe), "--out", str(tmp_path / "out")]) == 2
    assert "NOTICE is a link that leads out of its folder" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    (base / "NOTICE").unlink()
    assert run(["bake", str(recipe), "--out", str(tmp_path / "out")]) == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert "LICENSE.txt" in names
    assert not names & {"tokenizer.py", "tokenizer.bin", "LICENSE.py", "chat_template.so"}


def test_a_base_in_the_hubs_cache_is_copied_through_its_links(
    tmp_path: Path, write_recipe: RecipeWriter
) -> None:
    base = tiny_base(tmp_path / "models--x--y" / "snapshots" / ("0f" * 20))
    (base / "LICENSE").write_text("licence")
    (blobs := tmp_path / "models--x--y" / "blobs").mkdir()
    for path in list(base.iterdir()):
        blob = blobs / sha256(path)
        shutil.move(path, blob)
        path.symlink_to(Path("../../blobs") / blob.name)
    save_sae_lens(tmp_path / "sae", tiny_sae())
    recipe = write_recipe(TABLE, base={"model": f"models--x--y/snapshots/{base.name}"})
    bake_recipe(recipe, tmp_path / "out", force=False)
    assert (tmp_path / "out" / "LICENSE").read_text() == "licence"
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_symlink()]
