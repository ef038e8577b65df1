"""A config.json of a stranger's model: of which type each field has to be, and which say paths.

transformers checks some of these when it loads a model, and others never; bakeout copies the file
and computes with it long before.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from bake.errors import shown
from bake.tensors import DTYPES


def _whole(least: int, most: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and least <= value <= most


def _number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e30


def _above(value: Any) -> bool:
    return _number(value) and value > 0


def _ids(value: Any) -> bool:
    return isinstance(value, list) and all(map(_TOKEN, value))


def _names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _activation(value: Any) -> bool:
    """A name of transformers' table, after whatever guard stands before it."""
    return isinstance(value, str) and value.rpartition(": ")[2] in _ACTIVATIONS


def _dtype(value: Any) -> bool:
    return isinstance(value, str) and value.removeprefix("torch.") in _DTYPES


def _layer_types(value: Any) -> bool:
    return _names(value) and set(value) <= set(_LAYER_TYPES)


def _rope(value: Any) -> bool:
    """Of all layers, or of each type of layer."""
    if not isinstance(value, dict):
        return False
    if set(value) & set(_LAYER_TYPES):
        return all(
            part is None or (isinstance(part, dict) and _rope(part)) for part in value.values()
        )
    kinds = (value.get("rope_type"), value.get("type"))
    numbers = [value.get(key) for key in ("rope_theta", "factor", "partial_rotary_factor")]
    return all(kind is None or kind in _ROPES for kind in kinds) and all(
        number is None or _above(number) for number in numbers
    )


def heads_by_layer(value: Any) -> bool:
    """Whether a `per_layer_config` says nothing but the sizes of heads, by layers' numbers: what
    transformers writes of a Gemma 4, and the one rewriting of a model by its config that is read.
    """
    return isinstance(value, dict) and all(
        re.fullmatch("[0-9]{1,4}", layer)
        and isinstance(own, dict)
        and own.keys() <= {"head_dim", "num_key_value_heads"}
        and all(map(_SIZE, own.values()))
        for layer, own in value.items()
    )


_LAYER_TYPES = ("full_attention", "sliding_attention")
_DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
_ROPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional")
_ACTIVATIONS = frozenset(
    (
        *("gelu", "gelu_10", "gelu_accurate", "gelu_fast", "gelu_new", "gelu_python"),
        *("gelu_python_tanh", "gelu_pytorch_tanh", "hardswish", "laplace", "leaky_relu", "linear"),
        *("mish", "prelu", "quick_gelu", "relu", "relu2", "relu6", "sigmoid", "silu"),
        *("sqrtsoftplus", "swish", "tanh", "xielu"),
    )
)
_SIZE, _TOKEN, _COUNT = _whole(1, 1 << 24), _whole(-1, 1 << 24), _whole(0, 1 << 40)
MOST_LAYERS = 1024
_Check = tuple[Callable[[Any], bool], str]
_OF: dict[str, _Check] = {
    "num_hidden_layers": (_whole(1, MOST_LAYERS), f"a whole number from 1 to {MOST_LAYERS}"),
    **dict.fromkeys(
        (
            *("hidden_size", "intermediate_size", "vocab_size", "head_dim", "global_head_dim"),
            *("num_attention_heads", "num_key_value_heads", "num_global_key_value_heads"),
            *("vocab_size_per_layer_input", "num_experts", "top_k_experts"),
            "moe_intermediate_size",
        ),
        (_SIZE, "a whole number above 0"),
    ),
    **dict.fromkeys(
        (
            *("max_position_embeddings", "sliding_window", "sliding_window_pattern"),
            *("num_kv_shared_layers", "hidden_size_per_layer_input"),
        ),
        (_COUNT, "a whole number"),
    ),
    **dict.fromkeys(
        ("rms_norm_eps", "rope_theta", "rope_local_base_freq", "query_pre_attn_scalar"),
        (_above, "a number above 0"),
    ),
    **dict.fromkeys(
        (
            *("final_logit_softcapping", "attn_logit_softcapping", "attention_dropout"),
            "initializer_range",
        ),
        (_number, "a number"),
    ),
    **dict.fromkeys(
        (
            *("tie_word_embeddings", "attention_bias", "use_cache", "attention_k_eq_v"),
            *("enable_moe_block", "use_double_wide_mlp"),
        ),
        (lambda value: isinstance(value, bool), "true or false"),
    ),
    "use_bidirectional_attention": (
        lambda value: isinstance(value, bool) or value in ("all", "vision"),
        "true, false, all or vision",
    ),
    "per_layer_config": (heads_by_layer, "by layer, its own head_dim and num_key_value_heads"),
    "model_type": (lambda value: isinstance(value, str), "a string"),
    **dict.fromkeys(
        ("hidden_activation", "hidden_act"), (_activation, "an activation of transformers")
    ),
    **dict.fromkeys(("dtype", "torch_dtype"), (_dtype, "float32, bfloat16 or float16, as text")),
    "architectures": (_names, "a list of strings"),
    "layer_types": (_layer_types, f"a list of {' and '.join(_LAYER_TYPES)}"),
    **dict.fromkeys(("bos_token_id", "pad_token_id"), (_TOKEN, "a token's number")),
    "eos_token_id": (
        lambda value: _TOKEN(value) or _ids(value),
        "a token's number or a list of them",
    ),
    **dict.fromkeys(
        ("text_config", "vision_config"), (lambda value: isinstance(value, dict), "an object")
    ),
    **dict.fromkeys(
        ("rope_scaling", "rope_parameters"), (_rope, "an object with a rope_type and numbers")
    ),
}
"""By field of a Gemma's config: what holds for its value, unless it is null, and that in words."""
_PATHS = ("_name_or_path", "name_or_path")
_ABSOLUTE = re.compile(r"/[^/\s]+/|~/|\\\\|file:|[A-Za-z]:[\\/]")


def wrong_field(config: Mapping[str, Any]) -> str | None:
    """What is wrong with the first field of a wrong type: `key is …; expected …`; None where all
    are right. The text part of a config with images is looked at too.
    """
    parts = [("", config)]
    if isinstance(text := config.get("text_config"), dict):
        parts.append(("text_config.", text))
    for where, part in parts:
        if (wrong := _wrong(part, _OF, where)) is not None:
            return wrong
        kinds, n_layers = part.get("layer_types"), part.get("num_hidden_layers")
        if kinds is not None and n_layers is not None and len(kinds) != n_layers:
            return f"{where}layer_types has {len(kinds)} entries; expected {n_layers}"
        later = str(part.get("model_type")).removeprefix("clamped_").startswith("gemma4")
        if (own := part.get("per_layer_config")) and not later:
            return f"{where}per_layer_config is {shown(own)}; expected none but in Gemma 4"
        shared = part.get("num_kv_shared_layers") or 0
        if n_layers is not None and shared >= n_layers:
            return f"{where}num_kv_shared_layers is {shared}; expected fewer than {n_layers} layers"
        heads, groups = part.get("num_attention_heads"), part.get("num_key_value_heads")
        if heads is not None and groups is not None and heads % groups:
            return (
                f"{where}num_attention_heads is {heads}; expected a multiple of "
                f"num_key_value_heads, {groups}"
            )
    return None


_OF_GENERATION: dict[str, _Check] = {
    "do_sample": _OF["use_cache"],
    **{key: _OF[key] for key in ("bos_token_id", "pad_token_id", "eos_token_id")},
    **dict.fromkeys(("temperature", "top_p"), (_number, "a number")),
    "top_k": (_COUNT, "a whole number"),
}
"""By field of a generation_config.json, as `_OF`."""


def wrong_generation(config: Mapping[str, Any]) -> str | None:
    """What is wrong with the first field of a wrong type in a generation_config.json."""
    return _wrong(config, _OF_GENERATION)


def _wrong(config: Mapping[str, Any], checks: Mapping[str, _Check], where: str = "") -> str | None:
    for key, (right, expected) in checks.items():
        value = config.get(key)
        if value is not None and not right(value):
            return f"{where}{key} is {shown(value)}; expected {expected}"
    return None


def wrong_clamp(section: Any, *, n_layers: int, vocab_size: int) -> str | None:
    """What is wrong with a config's `sae_clamp`: `key is …; expected …`; None where nothing is.

    Args:
        section: as it was read.
        n_layers: of the model.
        vocab_size: of the model.
    """
    sites = section.get("sites") if isinstance(section, dict) else None
    if not isinstance(sites, list) or not sites or not all(isinstance(s, dict) for s in sites):
        return f"sae_clamp is {shown(section)}; expected sites, each with its layer"
    layer, k, token = _whole(0, n_layers - 1), _whole(1, 1 << 15), _whole(0, vocab_size - 1)
    for site in sites:
        for key, right, expected in (
            ("layer", layer, f"a layer from 0 to {n_layers - 1}"),
            ("k", k, "a whole number above 0"),
            ("exempt_bos", lambda value: isinstance(value, bool), "true or false"),
        ):
            if not right(site.get(key)):
                return f"sae_clamp.sites: {key} is {shown(site.get(key))}; expected {expected}"
        if "tau" in site and not (_number(site["tau"]) and 0 <= site["tau"] < 1 - 2**-25):
            return (
                f"sae_clamp.sites: tau is {shown(site['tau'])}; expected a number from 0 to below 1"
            )
        if any(key in site for key in ("topk", "d_sae", "dtype")):
            for key, right, expected in (
                (
                    "d_sae",
                    _whole(site["k"], 1 << 21),
                    f"a whole number from {site['k']} to {1 << 21}",
                ),
                ("topk", _whole(1, site.get("d_sae")), "a whole number from 1 to d_sae"),
                (
                    "dtype",
                    lambda value: isinstance(value, str) and value in DTYPES,
                    f"one of {', '.join(DTYPES)}",
                ),
            ):
                if not right(site.get(key)):
                    return f"sae_clamp.sites: {key} is {shown(site.get(key))}; expected {expected}"
    if len({site["layer"] for site in sites}) < len(sites):
        return "sae_clamp.sites: names a layer twice; expected one clamp for each layer"
    schema = 2 if any("tau" in site for site in sites) else 1
    stated = section.get("schema")
    if type(stated) is not int or stated != schema:
        return f"sae_clamp.schema is {shown(stated)}; expected {schema}"
    exempt = section.get("exempt_token_ids")
    if not isinstance(exempt, list) or not all(map(token, exempt)):
        return (
            f"sae_clamp.exempt_token_ids is {shown(exempt)}; expected a list of tokens from 0 to "
            f"{vocab_size - 1}"
        )
    return None


def is_local_path(value: Any) -> bool:
    """Whether a value names a place on somebody's machine."""
    return isinstance(value, str) and _ABSOLUTE.match(value) is not None


def without_paths(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without what says where it was loaded from: `_name_or_path`, and whatever else
    names a place on somebody's machine.
    """
    kept: dict[str, Any] = {}
    for key, value in config.items():
        if key in _PATHS or is_local_path(value):
            continue
        kept[key] = without_paths(value) if isinstance(value, dict) else value
    return kept
