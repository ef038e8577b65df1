"""A base model as it lies on disk: what a bake needs to know, read from headers only."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from bake.errors import ModelError, shown
from bake.families import FAMILIES, GEMMA_BOS, Family, own_heads
from bake.reading.capped import read_json
from bake.reading.model_config import MOST_LAYERS, wrong_field
from bake.recipe import Recipe
from bake.strangers.foreign import obeyed_keys
from bake.tensors import StoredTensor, indexed_tensors, stored_tensors

_ADAPTER = "adapter_config.json"
_FLOATS = ("F64", "F32", "BF16", "F16")
"""What safetensors calls the dtypes that a base's weights may be stored in."""
_QUANTIZERS = ("quantize_config.json", "quant_config.json", "quantization_config.json")
"""Files in which GPTQ and AWQ tools of their own say what config.json says today."""
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class BaseModel:
    """A base model's folder, checked for completeness."""

    folder: Path
    name: str
    """Hub id, or the folder's own name."""
    revision: str | None
    """Commit on the hub, where it came from there."""
    family: Family
    config: dict[str, Any] = field(repr=False)
    """config.json."""
    weight_map: dict[str, str] = field(repr=False)
    """Tensor name → shard file."""
    d_in: int
    """Hidden size."""
    n_layers: int
    layer_prefix: str
    """What stands before the layer's number in tensor names, `model.layers.` mostly."""

    @property
    def shards(self) -> list[str]:
        """Names of the weight files."""
        return sorted(set(self.weight_map.values()))

    @property
    def bos_token_id(self) -> int:
        """BOS as the model's config states it, else Gemma's own."""
        for config in (self.config, self.config.get("text_config") or {}):
            if type(config.get("bos_token_id")) is int:
                return int(config["bos_token_id"])
        return GEMMA_BOS


def find_base(recipe: Recipe) -> BaseModel:
    """The recipe's base model: its local folder, or its snapshot in the hub's cache.

    Raises:
        ModelError: it is missing, incomplete, damaged, or no supported Gemma.
    """
    local = recipe.local(recipe.base.model)
    if local.is_dir():
        return open_base(local, name=local.resolve().name, revision=None)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", recipe.base.model) or recipe.base.model[0] in "./":
        raise ModelError(
            f"base.model {recipe.base.model}: no such folder beside the recipe; "
            "expected a model folder, or a hub id (owner/name)"
        )
    folder = _download(recipe.base.model, recipe.base.revision)
    return open_base(folder, name=recipe.base.model, revision=folder.name)


def open_base(folder: Path, *, name: str, revision: str | None) -> BaseModel:
    """Check a model folder and read its config and tensor names; no tensor is read."""
    check_plain(folder, name)
    config = _read_json(folder / "config.json", name)
    family = _family_of(config, name)
    if (wrong := wrong_field(config)) is not None:
        raise ModelError(f"base model {name}: {wrong} (config.json). Download it again")
    try:
        tensors = indexed_tensors(folder, _weight_map(folder, name))
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(
            f"base model {name}: its weights cannot be read ({error}); download it again"
        ) from error
    for key, tensor in sorted(tensors.items()):
        part = re.fullmatch(r"(?!.*_tower\.)(?:.*\.)?layers\.\d+\.mlp\.gate_proj\.(.+)", key)
        other = tensor.dtype not in _FLOATS and key.endswith(".weight")
        if other or (part and part[1] != "weight"):
            raise _quantised(name, f"{key} as {tensor.dtype}")
    layer = re.compile(r"((?:.*\.)?layers\.)([0-9]{1,4})\.mlp\.gate_proj\.weight")
    found = [match for key in tensors if (match := layer.fullmatch(key))]
    if not found:
        raise ModelError(
            f"base model {name}: no decoder layers among its tensors; "
            "expected layers.N.mlp.gate_proj.weight"
        )
    layers = sorted(int(match[2]) for match in found)
    if layers != list(range(len(layers))):
        raise ModelError(
            f"base model {name}: decoder layers {shown(layers)} are not consecutive from 0; "
            "expected all of them. Download it again"
        )
    if len(shape := tensors[found[0][0]].shape) != 2:
        raise ModelError(
            f"base model {name}: {found[0][0]} has shape {list(shape)}; expected a matrix. "
            "Download it again"
        )
    if (wrong := wrong_size(config, tensors, found[0][1], len(layers))) is not None:
        raise ModelError(f"base model {name}: {wrong}. Download it again")
    return BaseModel(
        folder=folder,
        name=name,
        revision=revision,
        family=family,
        config=config,
        weight_map={key: tensor.file.name for key, tensor in tensors.items()},
        d_in=shape[1],
        n_layers=len(layers),
        layer_prefix=found[0][1],
    )


def wrong_size(
    config: dict[str, Any], tensors: Mapping[str, StoredTensor], prefix: str, n_layers: int
) -> str | None:
    """Which size config.json states otherwise than the tensors have it; None where none.

    Args:
        config: of the model.
        tensors: by name.
        prefix: what stands before a layer's number.
        n_layers: how many layers the tensors are of.
    """
    gate = tensors[f"{prefix}0.mlp.gate_proj.weight"].shape
    queries = tensors.get(f"{prefix}0.self_attn.q_proj.weight")
    text = config.get("text_config") or config
    text = {**text, **own_heads(text, 0)}
    if len(gate) != 2:
        return f"{prefix}0.mlp.gate_proj.weight has shape {list(gate)}; expected a matrix"
    sizes = {"hidden_size": gate[1], "intermediate_size": gate[0], "num_hidden_layers": n_layers}
    if queries is not None and queries.shape and text.get("num_attention_heads"):
        sizes["head_dim"] = queries.shape[0] // text["num_attention_heads"]
        keys = tensors.get(f"{prefix}0.self_attn.k_proj.weight")
        if keys is not None and keys.shape and sizes["head_dim"]:
            sizes["num_key_value_heads"] = keys.shape[0] // sizes["head_dim"]
    table = tensors.get(f"{prefix.removesuffix('layers.')}embed_tokens.weight")
    if table is not None and table.shape:
        sizes["vocab_size"] = table.shape[0]
    sizes |= _gemma_4_sizes(text, tensors, prefix, n_layers)
    for key, size in sizes.items():
        if (text.get(key) or size) != size:
            return (
                f"{key} is {shown(text[key])} in config.json; expected {size}, as its tensors "
                "have it"
            )
    for layer in range(n_layers):
        stated = own_heads(text, layer).get("head_dim")
        queries = tensors.get(f"{prefix}{layer}.self_attn.q_proj.weight")
        heads = text.get("num_attention_heads")
        if stated and heads and queries is not None and queries.shape[:1] != (stated * heads,):
            return (
                f"head_dim of layer {layer} is {stated} in config.json; expected another, as its "
                "tensors have it"
            )
    return None


def _gemma_4_sizes(
    text: Mapping[str, Any], tensors: Mapping[str, StoredTensor], prefix: str, n_layers: int
) -> dict[str, int]:
    """Sizes of what a Gemma 4 may have besides; 0 of what is stated and has no tensor."""
    table = tensors.get(f"{prefix.removesuffix('layers.')}embed_tokens_per_layer.weight")
    experts = tensors.get(f"{prefix}0.experts.gate_up_proj")
    sizes: dict[str, int] = {}
    if table is not None and len(table.shape) == 2:
        sizes["vocab_size_per_layer_input"] = table.shape[0]
        sizes["hidden_size_per_layer_input"] = table.shape[1] // n_layers
    elif text.get("hidden_size_per_layer_input"):
        sizes["hidden_size_per_layer_input"] = 0
    if experts is not None and len(experts.shape) == 3:
        sizes |= {"num_experts": experts.shape[0], "moe_intermediate_size": experts.shape[1] // 2}
    elif text.get("enable_moe_block"):
        sizes["num_experts"] = 0
    return sizes


def check_plain(folder: Path, name: str) -> None:
    """Refuse a model folder whose weights are not all of what transformers would run.

    Raises:
        ModelError: an adapter lies beside the weights, or they are quantised.
    """
    if (folder / _ADAPTER).is_file():
        raise ModelError(
            f"base model {name}: holds {_ADAPTER}, an adapter that transformers applies on "
            "loading; expected weights alone. Merge it first (peft: "
            "PeftModel.from_pretrained(base, folder).merge_and_unload().save_pretrained(out)), or "
            "move it elsewhere"
        )
    config = _read_json(folder / "config.json", name)
    n_layers = config.get("num_hidden_layers")
    if n_layers is not None and (type(n_layers) is not int or not 0 < n_layers <= MOST_LAYERS):
        raise ModelError(
            f"base model {name}: num_hidden_layers is {shown(n_layers)}; expected a whole number "
            f"from 1 to {MOST_LAYERS}. Download it again"
        )
    for of in (config, config.get("text_config")):
        for key in ("quantization_config", "compression_config"):
            if isinstance(of, dict) and of.get(key) is not None:
                stated = of[key]
                method = stated.get("quant_method") if isinstance(stated, dict) else stated
                raise _quantised(name, f"{key} with quant_method {shown(method)}")
    for file in _QUANTIZERS:
        if (folder / file).is_file():
            raise _quantised(name, file)
    for file, key, what in obeyed_keys(folder, below=False):
        # Stock classes are loaded whatever config.json names, and a bake writes its own there.
        if (file, key) != ("config.json", "auto_map"):
            raise ModelError(
                f"base model {name}: {file} says {key}, which {what}; expected a model that stock "
                "transformers loads by itself. Remove the key, or take another model"
            )


def _quantised(name: str, got: str) -> ModelError:
    return ModelError(
        f"base model {name}: is quantised ({got}); expected no quantization_config, and weights "
        "in float32, bfloat16 or float16. Take the model that it was made from, or load it with "
        "transformers, `model.dequantize()`, and save_pretrained it"
    )


def _download(model: str, revision: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError

    patterns = ["*.safetensors", "*.json", "*.model", "*.jinja", "*.txt", "LICENSE*", "NOTICE*"]
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=patterns))
    except GatedRepoError as error:
        raise ModelError(
            f"base model {model}: is gated; accept its licence on its page on the hub, then log "
            "in with `hf auth login`"
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"base model {model}: cannot be downloaded at revision {revision} "
            f"({type(error).__name__}); check the id and the network, or name a local folder"
        ) from error


def _read_json(path: Path, name: str) -> dict[str, Any]:
    try:
        data = read_json(path)
    except FileNotFoundError as error:
        raise ModelError(
            f"base model {name}: {path.name} is missing; expected a model folder as "
            "transformers writes it"
        ) from error
    except (OSError, ValueError) as error:
        raise ModelError(
            f"base model {name}: {path.name} cannot be read ({error}); expected a JSON object. "
            "Download it again"
        ) from error
    if not isinstance(data, dict):
        raise ModelError(
            f"base model {name}: {path.name} holds no JSON object; expected one. Download it again"
        )
    return data


def _family_of(config: dict[str, Any], name: str) -> Family:
    if "sae_clamp" in config:
        raise ModelError(f"base model {name}: is a clamped checkpoint already; take its base")
    model_type = config.get("model_type")
    family = FAMILIES.get(str(model_type))
    if family is None:
        raise ModelError(
            f"base model {name}: model_type is {shown(model_type)}; "
            f"expected one of {', '.join(FAMILIES)}"
        )
    architectures = config.get("architectures") or [family.architecture]
    if architectures != [family.architecture]:
        raise ModelError(
            f"base model {name}: architecture is {shown(architectures)}; expected "
            f"{family.architecture}"
        )
    return family


def _weight_map(folder: Path, name: str) -> Any:
    """Tensor name → file, from the one weight file or the index (transformers' own order)."""
    if (folder / WEIGHTS).is_file():
        return dict.fromkeys(stored_tensors(folder / WEIGHTS), WEIGHTS)
    if not (folder / INDEX).is_file():
        raise ModelError(
            f"base model {name}: no {WEIGHTS} and no {INDEX}; expected safetensors weights. "
            "Load it with transformers and save_pretrained it"
        )
    return _read_json(folder / INDEX, name).get("weight_map")
