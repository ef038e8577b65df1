"""Adapter folders: what is written, and to which base they are bound."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file

from bake.errors import ExportError, OutputError
from export.carriers.adapter import adapter_config, fingerprint, first_row, write_adapter
from export.clamped import open_clamped
from tests.folders import make_adapter
from tests.worlds import KINDS, tiny_base


@pytest.mark.parametrize("family", KINDS)
def test_the_folder_is_small_whole_and_without_weights_of_the_base(
    tmp_path: Path, family: str
) -> None:
    folder = make_adapter(tmp_path, family) / "adapter"
    found = {path.name for path in folder.iterdir()}
    assert found == {
        *("adapter_config.json", "adapter_model.safetensors", "recipe.toml", "README.md"),
        *("NOTICE", "manifest.json"),
    }
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["carrier"], manifest["exact"]) == ("adapter", True)
    assert set(manifest["files"]) == found - {"manifest.json"}
    for name, digest in manifest["files"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    tensors = load_file(folder / "adapter_model.safetensors")
    assert len(tensors) == 8 and all(".layers.1.sae_clamp_site." in name for name in tensors)
    assert str(tmp_path) not in (folder / "adapter_config.json").read_text()
    config = json.loads((folder / "adapter_config.json").read_text())
    files = sorted((tmp_path / "base").glob("*.safetensors"))
    hashes = [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]
    assert config["base_sha256"] == sorted(hashes)


def test_a_fingerprint_survives_another_dtype_and_no_change(tmp_path: Path) -> None:
    tiny_base(tmp_path / "base", dtype="bfloat16")
    found = set()
    for dtype in ("bfloat16", "float32"):
        model = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype)
        found.add(fingerprint([first_row(p) for p in model.parameters()]))
        found.add(fingerprint([first_row(p) for p in reversed(list(model.parameters()))]))
    assert len(found) == 1
    with torch.no_grad():
        model.model.layers[3].mlp.up_proj.weight[0, 5] += 0.5
    assert fingerprint([first_row(p) for p in model.parameters()]) not in found


def test_output_is_checked_and_a_base_without_hash_is_refused(tmp_path: Path) -> None:
    make_adapter(tmp_path)
    source = open_clamped(tmp_path / "checkpoint")
    with pytest.raises(OutputError, match="exists"):
        write_adapter(source, tmp_path / "adapter", card="")
    with pytest.raises(OutputError, match="overlaps"):
        write_adapter(source, tmp_path / "checkpoint" / "adapter", card="", force=True)
    write_adapter(source, tmp_path / "adapter", card="", force=True)
    source.manifest.files.pop(source.base_files[0])
    with pytest.raises(ExportError, match="manifest has no hash of model-00001"):
        adapter_config(source)
