"""A config.json of a stranger's model: of which type each field has to be, and which say paths.

transformers checks some of these when it loads a model, and others never; bakeout copies the file
and computes with it long before.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from bake.errors import shown


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


_SIZE, _TOKEN, _COUNT = _whole(1, 1 << 24), _whole(-1, 1 << 24), _whole(0, 1 << 40)
_MOST_LAYERS = 1024
_Check = tuple[Callable[[Any], bool], str]
_OF: dict[str, _Check] = {
    "num_hidden_layers": (_whole(1, _MOST_LAYERS), f"a whole number from 1 to {_MOST_LAYERS}"),
    **dict.fromkeys(
        (
            *("hidden_size", "intermediate_size", "vocab_size", "head_dim"),
            *("num_attention_heads", "num_key_value_heads"),
        ),
        (_SIZE, "a whole number above 0"),
    ),
    **dict.fromkeys(
        ("max_position_embeddings", "sliding_window", "sliding_window_pattern"),
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
        ("tie_word_embeddings", "attention_bias", "use_cache", "use_bidirectional_attention"),
        (lambda value: isinstance(value, bool), "true or false"),
    ),
    **dict.fromkeys(
        ("hidden_activation", "hidden_act", "dtype", "torch_dtype", "model_type"),
        (lambda value: isinstance(value, str), "a string"),
    ),
    **dict.fromkeys(("architectures", "layer_types"), (_names, "a list of strings")),
    **dict.fromkeys(("bos_token_id", "pad_token_id"), (_TOKEN, "a token's number")),
    "eos_token_id": (
        lambda value: _TOKEN(value) or _ids(value),
        "a token's number or a list of them",
    ),
    **dict.fromkeys(
        ("rope_scaling", "rope_parameters", "text_config", "vision_config"),
        (lambda value: isinstance(value, dict), "an object"),
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
        for key, (right, expected) in _OF.items():
            value = part.get(key)
            if value is not None and not right(value):
                return f"{where}{key} is {shown(value)}; expected {expected}"
        heads, groups = part.get("num_attention_heads"), part.get("num_key_value_heads")
        if heads is not None and groups is not None and heads % groups:
            return (
                f"{where}num_attention_heads is {heads}; expected a multiple of "
                f"num_key_value_heads, {groups}"
            )
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
    if len({site["layer"] for site in sites}) < len(sites):
        return "sae_clamp.sites: names a layer twice; expected one clamp for each layer"
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
