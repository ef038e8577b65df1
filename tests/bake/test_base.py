"""Base model folders: what is read from them, and how a broken one is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from bake.base import find_base, open_base
from bake.errors import ModelError
from bake.families import own_heads
from bake.recipe import Recipe
from tests.worlds import D_IN, KINDS, N_LAYERS, RecipeWriter, cut, tiny_base


@pytest.mark.parametrize("family", KINDS)
def test_facts_come_from_the_tensors(tmp_path: Path, family: str) -> None:
    folder = tiny_base(tmp_path / "base", family, shards=3)
    base = open_base(folder, name="base", revision=None)
    assert (base.d_in, base.n_layers, base.bos_token_id) == (D_IN, N_LAYERS, 2)
    assert base.layer_prefix.endswith("layers.") and "vision" not in base.layer_prefix
    assert len(base.shards) > 1
    assert all((folder / shard).is_file() for shard in base.shards)


ABSENT = object()


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config = {k: v for k, v in (config | changes).items() if v is not ABSENT}
        (folder / "config.json").write_text(json.dumps(config))

    return change


def edit_index(change: Callable[[dict[str, str]], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        change(index["weight_map"])
        path.write_text(json.dumps(index))

    return edit


def first_shard(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[0]


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda f: (f / "config.json").unlink(), "config.json is missing"),
        (lambda f: (f / "config.json").write_text("{"), "config.json cannot be read"),
        (lambda f: (f / "config.json").write_text("[]"), "no JSON object"),
        (edit_config(model_type="llama"), "model_type is 'llama'; expected one of gemma"),
        (
            edit_config(architectures=["Gemma2ForSequenceClassification"]),
            "expected Gemma2ForCausal",
        ),
        (edit_config(sae_clamp={}), "is a clamped checkpoint already"),
        (lambda f: first_shard(f).unlink(), "shard .* is missing"),
        (lambda f: cut(first_shard(f), 3000), "shard .* is damaged"),
        (lambda f: cut(first_shard(f), 4), "shard .* is damaged"),
        (edit_index(lambda m: m.update(dict.fromkeys(m, "../x"))), "points outside the folder"),
        (edit_index(lambda m: m.update(ghost=next(iter(m.values())))), "ghost is not in"),
        (
            edit_index(lambda m: m.update({min(m): next(s for s in m.values() if s != m[min(m)])})),
            "is not in model-.*, where the index places it",
        ),
        (
            lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {}}'),
            "holds no weight_map",
        ),
        (
            lambda f: (f / "model.safetensors.index.json").unlink(),
            "expected safetensors weights",
        ),
    ],
)
def test_broken_folders(tmp_path: Path, damage: Callable[[Path], None], match: str) -> None:
    folder = tiny_base(tmp_path / "base", shards=3)
    damage(folder)
    with pytest.raises(ModelError, match=match):
        open_base(folder, name="base", revision=None)


def beside(name: str, content: str = "{}") -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(content) and None


def restore(change: Callable[[str, np.ndarray], dict[str, np.ndarray]]) -> Callable[[Path], None]:
    """Store each layer's MLP gate otherwise."""

    def edit(folder: Path) -> None:
        path = first_shard(folder)
        tensors = load_file(path)
        for name in [name for name in tensors if name.endswith("mlp.gate_proj.weight")]:
            tensors |= change(name, tensors.pop(name))
        save_file(tensors, path)

    return edit


def as_float8(folder: Path) -> None:
    """One F8_E4M3 tensor, which numpy has not: its header is edited."""
    restore(lambda name, array: {name: np.zeros(array.shape, np.uint8)})(folder)
    path = first_shard(folder)
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = raw[8 : 8 + size].rstrip().replace(b'"U8"', b'"F8_E4M3"')
    header += b" " * (-len(header) % 8)
    path.write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + size :])


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            edit_config(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
            "quantization_config with quant_method 'bitsandbytes'",
        ),
        (edit_config(quantization_config={"quant_method": "gptq"}), "quant_method 'gptq'"),
        (edit_config(quantization_config={"quant_method": "fp8"}), "quant_method 'fp8'"),
        (edit_config(quantization_config={}), "quantization_config"),
        (edit_config(quantization_config="int8"), "quant_method 'int8'"),
        (edit_config(compression_config={"quant_method": "compressed-tensors"}), "compression_"),
        (edit_config(text_config={"quantization_config": {"quant_method": "awq"}}), "'awq'"),
        (beside("quantize_config.json"), r"quantize_config\.json"),
        (restore(lambda n, a: {n: a.astype(np.int8)}), "gate_proj.weight as I8"),
        (restore(lambda n, a: {n: np.zeros((a.size // 2, 1), np.uint8)}), "gate_proj.weight as U8"),
        (
            restore(lambda n, a: {f"{n}.absmax": a, n: np.zeros((9, 1), np.uint8)}),
            "gate_proj.weight as U8",
        ),
        (
            restore(lambda n, a: {n.replace(".weight", ".qweight"): a.astype(np.int32)}),
            "gate_proj.qweight as I32",
        ),
        (as_float8, "gate_proj.weight as F8_E4M3"),
    ],
)
def test_quantised_bases_are_refused_in_one_line(
    tmp_path: Path, change: Callable[[Path], None], match: str
) -> None:
    folder = tiny_base(tmp_path / "base")
    change(folder)
    with pytest.raises(ModelError, match=match) as caught:
        open_base(folder, name="base", revision=None)
    said = str(caught.value)
    assert "base model base: is quantised" in said and "quantization_config" in said
    assert "dequantize()" in said and "\n" not in said


@pytest.mark.parametrize(
    "files",
    [
        {"adapter_config.json": '{"peft_type": "LORA"}', "adapter_model.safetensors": ""},
        {"adapter_config.json": '{"peft_type": "PROMPT_TUNING"}', "adapter_model.bin": ""},
        {"adapter_config.json": "{"},
    ],
)
@pytest.mark.parametrize("weights", [True, False])
def test_an_adapter_beside_the_weights_is_refused(
    tmp_path: Path, files: dict[str, str], weights: bool
) -> None:
    folder = tiny_base(tmp_path / "base")
    if not weights:  # an adapter by itself
        for path in folder.iterdir():
            path.unlink()
    for name, text in files.items():
        beside(name, text)(folder)
    with pytest.raises(ModelError, match=r"base: holds adapter_config\.json.*merge_and_unload"):
        open_base(folder, name="base", revision=None)


def test_what_an_adapter_in_another_folder_says_is_not_the_bases(tmp_path: Path) -> None:
    folder = tiny_base(tmp_path / "base")
    (folder / "adapter").mkdir()
    beside("adapter/adapter_config.json")(folder)
    assert open_base(folder, name="base", revision=None).n_layers == N_LAYERS


def test_names_that_lead_nowhere(tmp_path: Path, write_recipe: RecipeWriter) -> None:
    clamp = {"sae": {"path": "sae"}, "method": "zero", "features": [1]}
    for model, match in (
        ("./absent", "no such folder"),
        ("no-owner", "no such folder"),
        ("owner/absent", "cannot be downloaded"),
    ):
        with pytest.raises(ModelError, match=match):
            find_base(Recipe.load(write_recipe(clamp, base={"model": model})))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"config\.json is missing"):
        find_base(Recipe.load(write_recipe(clamp, base={"model": "empty"})))


@pytest.mark.parametrize(
    ("kind", "stated", "match"),
    [
        ("gemma4_text, per-layer embeddings", {"hidden_size_per_layer_input": 7}, "expected 16"),
        ("gemma4_text, per-layer embeddings", {"vocab_size_per_layer_input": 98}, "expected 99"),
        ("gemma4_text", {"hidden_size_per_layer_input": 1 << 20}, "expected 0, as its tensors"),
        ("gemma4_text, experts", {"num_experts": 1 << 20}, "expected 4"),
        ("gemma4_text, experts", {"moe_intermediate_size": 25}, "expected 24"),
        ("gemma4_text", {"enable_moe_block": True, "num_experts": 9}, "expected 0, as its tensors"),
        ("gemma4_text", {"per_layer_config": {"3": {"head_dim": 512}}}, "head_dim of layer 3"),
        ("gemma4_text", {"per_layer_config": ABSENT, "global_head_dim": 24}, "of layer 1"),
        ("gemma4_text", {"head_dim": 24}, "head_dim is 24"),
    ],
)
def test_a_gemma_4_of_other_sizes_is_refused_before_it_is_loaded(
    tmp_path: Path, kind: str, stated: dict[str, Any], match: str
) -> None:
    folder = tiny_base(tmp_path / "base", kind)
    edit_config(**stated)(folder)
    with pytest.raises(ModelError, match=match) as caught:
        open_base(folder, name="base", revision=None)
    assert "\n" not in str(caught.value)


def test_heads_as_google_states_them_are_read(tmp_path: Path) -> None:
    """With `global_head_dim` and `num_global_key_value_heads` in place of `per_layer_config`."""
    from transformers import AutoConfig

    folder = tiny_base(tmp_path / "base", "gemma4_text")
    sizes = {"global_head_dim": 16, "num_global_key_value_heads": 1}
    edit_config(per_layer_config=ABSENT, **sizes)(folder)
    base = open_base(folder, name="base", revision=None)
    loaded = AutoConfig.from_pretrained(folder)
    for layer, own in enumerate(loaded.per_layer_config):
        found = {"head_dim": 8, "num_key_value_heads": 2} | own_heads(base.config, layer)
        assert found == {
            "head_dim": own.head_dim,
            "num_key_value_heads": own.num_key_value_heads,
        }
