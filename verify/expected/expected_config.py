"""What the configs of a folder must say: the base's, and the changes that make a clamped model of
it, key by key. Written without `export`'s own writers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from bake.base import BaseModel
from bake.reading.model_config import without_paths
from bake.recipe import Recipe
from export.clamped import GUARD
from export.code_check import PEFT_TYPE
from export.manifest import CompiledEntry
from verify.expected.compiled_places import Places, stock_config
from verify.report.findings import Failure

MODULE = "modeling_clamped_gemma"
"""The modeling file of a checkpoint, without .py."""
_ACTIVATIONS = ("hidden_activation", "hidden_act")
"""The fields that stock classes, of one version or another, read the activation from."""
_UNREAD = "_name_or_path"
"""What transformers overwrites on loading: where a base was loaded from, last time."""
_ABSENT = object()


@dataclass(frozen=True)
class Placed:
    """Where a recipe's clamp sits."""

    layer: int
    k: int
    """How many features are read or set."""
    exempt_bos: bool
    topk: int | None = None
    """Of a TopK SAE, how many features are active on a token; of others none, as the next two."""
    d_sae: int | None = None
    dtype: str | None = None
    """What its encoder is stored in."""
    tau: float | None = None
    """Of a sequence gate."""


def checkpoint_config(base: BaseModel, recipe: Recipe, places: Sequence[Placed]) -> dict[str, Any]:
    """config.json of a clamped checkpoint."""
    config, family = without_paths(deepcopy(base.config)), base.family
    text = config
    if "text_config" in config:
        text = config["text_config"]
        text["model_type"] = f"{family.model_type}_text"
    activation = text.get(family.activation_field) or "gelu_pytorch_tanh"
    for name in _ACTIVATIONS:
        text[name] = GUARD + str(text.get(name) or activation)
    if recipe.base.dtype != "auto":
        config.pop("torch_dtype", None)
        config["dtype"] = recipe.base.dtype
    classes = {"AutoConfig": family.config, "AutoModel": family.clamped_model}
    classes |= dict.fromkeys(family.auto_classes, family.clamped)
    config["model_type"] = family.model_type
    config["architectures"] = [family.clamped]
    config["auto_map"] = {auto: f"{MODULE}.{name}" for auto, name in classes.items()}
    config["sae_clamp"] = clamp_section(base, places)
    config["transformers.js_config"] = {"use_external_data_format": True}
    return config


def clamp_section(base: BaseModel, places: Sequence[Placed]) -> dict[str, Any]:
    """Where clamps sit, and whom they spare: BOS, and nothing else."""
    spares = any(place.exempt_bos for place in places)
    return {
        "schema": 1 if all(place.tau is None for place in places) else 2,
        "sites": [
            {key: value for key, value in vars(place).items() if value is not None}
            for place in sorted(places, key=lambda place: place.layer)
        ],
        "exempt_token_ids": [base.bos_token_id] if spares else [],
    }


def past_the_clamp(base: BaseModel, layer: int) -> dict[str, Any]:
    """What a manifest must say of what goes past a clamp: the layers behind it whose keys and
    values an earlier one made, and whether they are given each token's embedding again.
    """
    stock = stock_config(base).get_text_config()
    n, own = base.n_layers, base.n_layers - getattr(stock, "num_kv_shared_layers", 0)
    kinds = getattr(stock, "layer_types", None) or [""] * n
    made_by = [max((j for j in range(own) if kinds[j] == kinds[i]), default=i) for i in range(n)]
    behind = range(max(own, layer + 1), n)
    width = getattr(stock, "hidden_size_per_layer_input", 0)
    return {
        "old_keys": [i for i in behind if made_by[i] <= layer],
        "embedded_again": bool(width) and layer < n - 1,
    }


def compiled_config(
    base: BaseModel, compiled: CompiledEntry, places: Places, mlp: int
) -> dict[str, Any]:
    """config.json of a compiled folder: a stock one, wider and deeper.

    Args:
        base: what was compiled.
        compiled: what the manifest says: the new width, the dtype.
        places: where its layers stand.
        mlp: width of its MLPs, as its tensors have it.
    """
    family, config = base.family, without_paths(deepcopy(base.config))
    stock = stock_config(base)
    apart = getattr(stock, "per_layer_attributes", None) or ()  # of Gemma 4's heads
    for name in (
        *("head_dim", "layer_types", "num_key_value_heads", "query_pre_attn_scalar"),
        *("rms_norm_eps", family.activation_field),
    ):
        if name not in apart and (value := getattr(stock, name, None)) is not None:
            config[name] = value
    if heads := config.get("per_layer_config"):
        own = {number: heads.get(str(places.like(number))) for number in range(places.n_layers)}
        config["per_layer_config"] = {str(number): of for number, of in own.items() if of}
    narrow, wide = int(stock.hidden_size), compiled.hidden_size[1]
    eps = float(stock.rms_norm_eps)
    config.pop("torch_dtype", None)
    if places.types:
        config["layer_types"] = list(places.types)
    if places.period is None:  # else whoever counts layers counts on
        config.pop("sliding_window_pattern", None)
    if family.layers_27b is not None:
        # Source: llama.cpp, src/models/gemma2.cpp and gemma3.cpp: it is read from the sizes.
        largest = places.n_layers == family.layers_27b
        per_head = wide // int(stock.num_attention_heads)
        config["query_pre_attn_scalar"] = per_head if largest else int(stock.head_dim)
    return config | {
        "model_type": family.model_type.removeprefix("clamped_"),
        "architectures": [family.architecture],
        "hidden_size": wide,
        "intermediate_size": mlp,
        "num_hidden_layers": places.n_layers,
        **dict.fromkeys(_ACTIVATIONS, "gelu_pytorch_tanh"),
        "rms_norm_eps": eps if family.scaled else eps * narrow / wide,  # in this order: to the bit
        "dtype": compiled.dtype,
    }


def adapter_config(
    base: BaseModel, places: Sequence[Placed], name: str, revision: str | None, fingerprint: str
) -> dict[str, Any]:
    """adapter_config.json, but for `base_sha256`, which is compared with the base's files.

    Args:
        base: what the adapter is loaded over.
        places: of its clamps.
        name: of the base, as the manifest states it.
        revision: likewise.
        fingerprint: of the base's tensors.
    """
    text = {**base.config, **(base.config.get("text_config") or {})}
    return {
        "peft_type": PEFT_TYPE,
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "base_model_name_or_path": name,
        "revision": revision,
        "sae_clamp": clamp_section(base, places),
        "base_fingerprint": fingerprint,
        **{key: text[key] for key in ("hidden_size", "num_hidden_layers", "vocab_size")},
    }


# --------------------------------------------------------------------------- comparing


def differences(
    engine: str, file: str, found: Mapping[str, Any], expected: Mapping[str, Any]
) -> Iterator[Failure]:
    """One failure of kind `integrity` for each key in which a JSON file is not what it must be:
    changed, missing, or unknown.
    """
    for key, got, wanted in _differences(found, expected, ""):
        if key != _UNREAD or not (got is _ABSENT or isinstance(got, str)):
            what = f"{file}: {key} is {_said(got)}, expected {_said(wanted)}"
            yield Failure("integrity", engine, what, _said(got), _said(wanted))


def _differences(found: Any, expected: Any, at: str) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(found, Mapping) and isinstance(expected, Mapping):
        for key in sorted({*found, *expected}):
            pair = found.get(key, _ABSENT), expected.get(key, _ABSENT)
            yield from _differences(*pair, f"{at}.{key}" if at else str(key))
    elif not _same(found, expected):
        yield at, found, expected


def _same(found: Any, expected: Any) -> bool:
    """Equal, and of one type: 1 is neither 1.0 nor true."""
    if isinstance(found, list) and isinstance(expected, list):
        pairs = zip(found, expected, strict=False)
        return len(found) == len(expected) and all(_same(*pair) for pair in pairs)
    if isinstance(found, dict) and isinstance(expected, dict):
        return found.keys() == expected.keys() and all(
            _same(found[key], expected[key]) for key in found
        )
    return type(found) is type(expected) and bool(found == expected)


def _said(value: Any) -> str:
    """A value in a line."""
    if value is _ABSENT:
        return "absent"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}…"
