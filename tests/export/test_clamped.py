from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from bake.errors import FolderError
from bakeout.verbs.baking import bake_recipe
from export.clamped import check_weights, open_clamped
from tests.folders import rehash
from tests.worlds import cut, save_sae_lens, tiny_base, tiny_sae

SHARD = "model-sae-clamp.safetensors"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    tiny_base(folder / "base", shards=2)
    save_sae_lens(folder / "sae", tiny_sae())
    (folder / "recipe.toml").write_text(
        'schema = 1\n[base]\nmodel = "base"\nlicense = "apache-2.0"\n[[clamp]]\n'
        'sae = { path = "sae" }\nmethod = "clamp"\nfeatures = [1, 5]\nvalue = -6.0\n'
    )
    bake_recipe(folder / "recipe.toml", folder / "checkpoint", force=False)
    return folder / "checkpoint"


def test_it_reads_the_base_and_the_clamp(checkpoint: Path) -> None:
    source = open_clamped(checkpoint)
    base = json.loads((checkpoint.parent / "base" / "config.json").read_text())
    assert source.model_type == "gemma2" and source.name == "checkpoint"
    assert source.base_config["hidden_activation"] == base["hidden_activation"]
    assert "auto_map" not in source.base_config and "sae_clamp" not in source.base_config
    assert source.exempt_token_ids == (2,)
    (site,) = source.sites
    assert site.layer == 1 and site.exempt_bos
    stored = load_file(checkpoint / SHARD)
    for name in ("W_enc", "b_enc", "theta", "W_dec", "trigger", "route", "value", "scale"):
        assert np.array_equal(getattr(site, name), stored[f"model.layers.1.sae_clamp.{name}"])
    first = next(iter(source.base_tensors.values()))
    with first.file.open("rb") as file:
        file.seek(first.offset)
        data = np.frombuffer(file.read(4 * int(np.prod(first.shape))), "<f4")
    name = next(iter(source.base_tensors))
    assert np.array_equal(data.reshape(first.shape), load_file(first.file)[name])
    assert SHARD not in source.base_files and {SHARD, *source.base_files} == set(source.shards)


def edit(folder: Path, name: str, change: Callable[[dict[str, Any]], Any]) -> None:
    data = json.loads((folder / name).read_text())
    change(data)
    (folder / name).write_text(json.dumps(data))


def spoil(folder: Path) -> None:
    tensors = load_file(folder / SHARD)
    tensors["model.layers.1.sae_clamp.value"][0] = np.nan
    save_file(tensors, folder / SHARD)


DAMAGES: list[tuple[Callable[[Path], Any], str]] = [
    (lambda f: edit(f, "manifest.json", lambda m: m.update(carrier="other")), "carrier other"),
    (lambda f: edit(f, "config.json", lambda c: c.pop("sae_clamp")), "has no clamp"),
    (
        lambda f: edit(f, "config.json", lambda c: c.update(model_type="llama")),
        "type is .llama",
    ),
    (lambda f: edit(f, "config.json", lambda c: c["sae_clamp"].pop("sites")), "has no clamp"),
    (lambda f: edit(f, "config.json", lambda c: c["sae_clamp"]["sites"][0].update(k=9)), "shapes"),
    (lambda f: (f / "manifest.json").unlink(), "has no manifest.json"),
    (lambda f: (f / "config.json").write_text("{"), "config.json: cannot be read"),
    (lambda f: (f / "config.json").write_text("[]"), "is no JSON object"),
    (lambda f: (f / "config.json").unlink(), "config.json is missing"),
    (lambda f: cut(f / SHARD, 300), "cannot be read"),
    (spoil, "is not finite"),
]


@pytest.mark.parametrize(("damage", "match"), DAMAGES)
def test_a_damaged_folder_is_refused_in_one_line(
    checkpoint: Path, tmp_path: Path, damage: Callable[[Path], Any], match: str
) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "folder")
    damage(folder)
    if (folder / "manifest.json").exists():
        rehash(folder)
    with pytest.raises(FolderError, match=match) as caught:
        open_clamped(folder)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_what_the_manifest_lists_is_refused(
    checkpoint: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "folder")
    with (folder / "config.json").open("a") as file:
        file.write(" ")
    with pytest.raises(FolderError, match=r"config\.json: is not the file that the manifest lists"):
        open_clamped(folder)
    folder = shutil.copytree(checkpoint, tmp_path / "again")
    data = (folder / SHARD).read_bytes()
    (folder / SHARD).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(FolderError, match=rf"{SHARD}: is not the file that the manifest lists"):
        check_weights(open_clamped(folder))
