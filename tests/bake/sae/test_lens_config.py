"""cfg.json: what sae_lens refuses or drops unseen is refused, in one line; names of hook points."""

from __future__ import annotations

import ast
import inspect
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from bake.errors import SAEError
from bake.sae.folding import load_slice
from bake.sae.layouts import open_sae_folder, resolve_layer
from bake.sae.lens_config import FIELDS, REASONS
from bake.sources import layer_of
from tests.worlds import D_IN, D_SAE, save_sae_lens, tiny_sae

OLD = {
    "d_in": D_IN,
    "d_sae": D_SAE,
    "dtype": "float32",
    "hook_name": "blocks.1.hook_resid_post",
    "activation_fn_str": "relu",
}


def sae(tmp_path: Path, architecture: str = "standard") -> Path:
    return save_sae_lens(tmp_path / "sae", tiny_sae(), architecture=architecture)


def changed(folder: Path, **fields: Any) -> Path:
    path = folder / "cfg.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return folder


def use(folder: Path) -> tuple[int, str]:
    """All of what a bake does with an SAE."""
    files = open_sae_folder(folder)
    load_slice(files, [0, 1])
    return resolve_layer(files, None, "x")


def sae_lens_loads(folder: Path) -> bool:
    from sae_lens import SAE

    try:
        found = SAE.load_from_disk(folder)
    except Exception:
        return False
    return found.cfg.metadata.hook_name is not None


def test_every_field_of_sae_lens_s_loaders_is_sorted() -> None:
    """A new one is to be read, checked or found to be of no account in `lens_config.py`."""
    from sae_lens.loading import pretrained_sae_loaders as loaders
    from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY

    known = set(loaders.LLM_METADATA_KEYS)
    for architecture in ("standard", "jumprelu", "gated", "topk"):
        known |= {field.name for field in fields(SAE_CLASS_REGISTRY[architecture][1])}
    tree = ast.parse(inspect.getsource(loaders.handle_pre_6_0_config))
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):  # the names that it changes
            known |= {key.value for key in node.keys if isinstance(key, ast.Constant)}
        called = isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "setdefault"
        if called:
            known.add(node.args[0].value)
    assert known <= FIELDS
    architectures = {*SAE_CLASS_REGISTRY, *SAE_TRAINING_CLASS_REGISTRY}
    assert architectures - {"standard", "jumprelu", "gated", "topk"} <= set(REASONS)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        # broken
        ({"architecture": "vanilla"}, "architecture is 'vanilla'; expected standard"),
        ({"architecture": ["standard"]}, r"architecture is \['standard'\]"),
        ({"architecture": None}, "architecture is None"),
        ({"metadata": []}, r"metadata is \[\]; expected a JSON object"),
        ({"metadata": None}, "metadata is None; expected a JSON object"),
        ({"metadata": {"sae_lens_version": "6.x"}}, "sae_lens_version is '6.x'"),
        ({"metadata": {"sae_lens_version": 6}}, "sae_lens_version is 6"),
        ({"sae_lens_version": [6, 0]}, r"sae_lens_version is \[6, 0\]"),
        ({"d_in": [D_IN]}, r"d_in is \[32\]; expected a whole number"),
        ({"d_sae": "64"}, "d_sae is '64'; expected a whole number"),
        ({"d_sae": None}, "d_sae is None"),
        ({"apply_b_dec_to_input": "no"}, "apply_b_dec_to_input is 'no'; expected true or false"),
        ({"normalize_activations": ["none"]}, r"normalize_activations is \['none'\]"),
        ({"normalize_activations": None}, "normalize_activations is None"),
        ({"normalize_activations": True}, "normalize_activations is True"),
        ({"metadata": {"sae_lens_version": "6.0.0", "hook_name": ["a"]}}, "hook_name is"),
        # what sae_lens refuses
        ({"d_in": D_IN + 1}, r"W_enc has shape \[32, 64\], but its config states \[33, 64\]"),
        ({"d_sae": D_SAE - 1}, r"but its config states \[32, 63\]"),
        ({"reshape_activations": "hook_z"}, "reshape_activations is 'hook_z'"),
        # what sae_lens drops
        ({"activation_fn_str": "tanh-relu"}, "activation_fn is 'tanh-relu'; expected null or relu"),
        ({"activation_fn": "gelu"}, "activation_fn is 'gelu'"),
        ({"activation_fn": "relu", "activation_fn_kwargs": {"k": 3}}, "activation_fn_kwargs"),
        ({"hook_head_index": 3}, "hook_head_index is 3; expected null"),
        (
            {"hook_name": "blocks.2.hook_resid_post"},
            "hook_name is 'blocks.2.hook_resid_post' at the top level",
        ),
        (
            {"metadata": {"sae_lens_version": "6.0.0"}, "hook_name": "blocks.1.hook_resid_post"},
            "at the top level, where sae_lens 6 does not read it",
        ),
        (
            {"metadata": {"sae_lens_version": "6.0.0"}, "hook_point": "blocks.1.hook_resid_post"},
            "at the top level",
        ),
        # another place
        (
            {"metadata": {"sae_lens_version": "6.0.0", "hook_name_out": "blocks.1.hook_mlp_out"}},
            "hook_name_out is 'blocks.1.hook_mlp_out'; expected null",
        ),
        (
            {
                "metadata": {
                    "sae_lens_version": "6.0.0",
                    "hook_name": "blocks.1.hook_resid_post",
                    "hf_hook_name": "model.layers.1.self_attn.o_proj.input",
                }
            },
            'hook point "model.layers.1.self_attn.o_proj.input" is not supported',
        ),
        (
            {
                "metadata": {
                    "sae_lens_version": "6.0.0",
                    "hook_name": "blocks.1.hook_resid_post",
                    "hf_hook_name": "model.layers.2.output",
                }
            },
            "expected one place",
        ),
    ],
)
def test_a_config_of_sae_lens_6_that_says_something_else(
    tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    folder = changed(sae(tmp_path), **fields)
    with pytest.raises(SAEError, match=message) as caught:
        use(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hook_name": None}, "hook_name is None; expected a hook point"),
        ({"hook_name": 7}, "hook_name is 7"),
        ({"hook_point": "blocks.2.hook_resid_post"}, "hook_point is .*, but hook_name is"),
        ({"sae_lens_version": "3.x"}, "sae_lens_version is '3.x'; expected a version"),
        ({"architecture": "vanilla"}, "architecture is 'vanilla'"),
        ({"architecture": {}}, r"architecture is \{\}"),
        ({"activation_fn_str": "tanh-relu"}, "activation_fn is 'tanh-relu'"),
        ({"activation_fn_str": ["relu"]}, r"activation_fn is \['relu'\]"),
        ({"activation_fn_str": "topk"}, "k is None; expected a whole number from 1 to d_sae, 64"),
        ({"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 0}}, "k is 0; expected"),
        ({"activation_fn_str": "topk", "activation_fn_kwargs": [4]}, "k is None; expected"),
        ({"normalize_activations": "layer_norm"}, "normalize_activations is layer_norm"),
        ({"normalize_activations": True}, "normalize_activations is expected_average_only_in"),
        ({"hook_point_head_index": 0}, "hook_head_index is 0"),
        ({"metadata": []}, "metadata is"),
        ({"d_in": D_IN * 2}, "config states"),
    ],
)
def test_an_older_config_that_says_something_else(
    tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    folder = sae(tmp_path)
    (folder / "cfg.json").write_text(json.dumps(OLD | fields))
    with pytest.raises(SAEError, match=message) as caught:
        use(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["[]", "3", "null", "{", '"cfg"', "\xff", "[" * 100_000])
def test_a_file_that_is_no_object_is_named(tmp_path: Path, text: str) -> None:
    folder = sae(tmp_path)
    (folder / "cfg.json").write_text(text, encoding="latin-1")
    with pytest.raises(SAEError, match="JSON object") as caught:
        use(folder)
    assert "cfg.json" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("architecture", "tensor", "message"),
    [
        ("standard", "scaling_factor", "scaling_factor is not 1 throughout"),
        ("jumprelu", "scaling_factor", "scaling_factor is not 1 throughout"),
        ("gated", "scaling_factor", "scaling_factor is not 1 throughout"),
        ("standard", "threshold", "holds threshold too, which an SAE of architecture standard"),
        ("gated", "b_enc", "holds b_enc too"),
        ("jumprelu", "W_skip", "holds W_skip too"),
    ],
)
def test_tensors_that_nobody_reads(
    tmp_path: Path, architecture: str, tensor: str, message: str
) -> None:
    folder = sae(tmp_path, architecture)
    weights = folder / "sae_weights.safetensors"
    more = {tensor: np.full(D_SAE, 1.5, np.float32)}
    save_file(load_file(weights) | more, weights)
    assert not sae_lens_loads(folder)
    with pytest.raises(SAEError, match=message):
        use(folder)


def test_a_scaling_factor_of_1_says_nothing(tmp_path: Path) -> None:
    folder = sae(tmp_path)
    weights = folder / "sae_weights.safetensors"
    save_file(load_file(weights) | {"scaling_factor": np.ones(D_SAE, np.float32)}, weights)
    assert sae_lens_loads(folder)
    assert use(folder) == (1, "blocks.1.hook_resid_post")


MUTATIONS: list[dict[str, Any]] = [
    {},
    {"architecture": None},
    {"architecture": "jumprelu"},
    {"d_in": 1},
    {"d_sae": 1},
    {"d_sae": [64]},
    {"metadata": []},
    {"metadata": {}},
    {"metadata": {"sae_lens_version": "6.54"}},
    {"metadata": {"sae_lens_version": "6.0.0.dev1", "hook_name": "blocks.1.hook_resid_post"}},
    {"metadata": {"sae_lens_version": "x"}},
    {"sae_lens_version": "x"},
    {"normalize_activations": None},
    {"normalize_activations": False},
    {"normalize_activations": "l2"},
    {"reshape_activations": "hook_z"},
    {"hook_name": None},
    {"hook_name": "blocks.1.hook_resid_post"},
    {"hook_point": "blocks.1.hook_resid_post", "sae_lens_version": "5.0"},
    {"finetuning_scaling_factor": True},
]


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("fields", MUTATIONS, ids=str)
def test_what_sae_lens_refuses_is_refused(
    tmp_path: Path, fields: dict[str, Any], old: bool
) -> None:
    folder = sae(tmp_path)
    if old:
        (folder / "cfg.json").write_text(json.dumps(OLD))
    changed(folder, **fields)
    loads = sae_lens_loads(folder)
    try:
        use(folder)
    except SAEError as error:
        assert "\n" not in str(error)
    else:
        assert loads


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("blocks.7.hook_resid_post", 7),
        ("blocks.7.hook_out", 7),
        ("model.layers.7", 7),
        ("model.layers.7.output", 7),
        ("model.layers.7.output.0", 7),
        ("layers.7", 7),
        ("language_model.model.layers.7", 7),
        ("model.language_model.layers.7.output", 7),
        ("blocks.7.hook_resid_pre", 6),
        ("blocks.7.hook_in", 6),
        ("model.layers.7.input", 6),
    ],
)
def test_names_of_the_residual_stream(tmp_path: Path, name: str, layer: int) -> None:
    assert layer_of(name) == layer
    folder = save_sae_lens(tmp_path / "sae", tiny_sae(), hook_name=name)
    stated = name if "hook_resid" in name else f"blocks.{layer}.hook_resid_post"
    assert use(folder) == (layer, stated)
    plain = f"blocks.{layer}.hook_resid_post"
    assert resolve_layer(open_sae_folder(folder), plain, "x") == (layer, plain)


@pytest.mark.parametrize(
    "name",
    [
        "blocks.7.hook_resid_mid",
        "blocks.7.hook_mlp_out",
        "blocks.7.mlp.hook_out",
        "blocks.7.attn.hook_in",
        "blocks.7.ln1.hook_out",
        "model.layers.7.mlp",
        "model.layers.7.mlp.output",
        "model.layers.7.post_feedforward_layernorm.output",
        "model.layers.0.input",
        "blocks.0.hook_in",
        "vision_tower.encoder.layers.7",
        "model.vision_tower.layers.7",
        "model.norm",
        "layers.7.0",
        "blocks.7",
    ],
)
def test_names_of_other_places(name: str) -> None:
    with pytest.raises(ValueError, match=r"not supported|embedding"):
        layer_of(name)
