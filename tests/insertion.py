"""A base model in memory and its clamps → a clamped model that shares the base's tensors."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

import bake.modeling_clamped_gemma as clamped
from bake.clamp import ClampWeights, clamp_section
from bake.errors import ModelError
from bake.families import FAMILIES, GEMMA_BOS


def insert(base: PreTrainedModel, clamps: list[ClampWeights]) -> PreTrainedModel:
    """Build the clamped model of a base. The base itself is not changed.

    Args:
        base: a stock Gemma model; its tensors are shared, not copied.
        clamps: what `bake.clamp.load_clamps` returns.

    Raises:
        ModelError: the model is of another family.
    """
    family = FAMILIES.get(base.config.model_type)
    if family is None or type(base).__name__ != family.architecture:
        raise ModelError(
            f"model of class {type(base).__name__}: expected one of "
            f"{', '.join(f.architecture for f in FAMILIES.values())}"
        )
    bos = base.config.get_text_config().bos_token_id
    config = getattr(clamped, family.config)(**base.config.to_dict())
    config.sae_clamp = clamp_section(clamps, GEMMA_BOS if bos is None else bos)
    if hasattr(config, "text_config"):
        config.text_config.sae_clamp = config.sae_clamp
    config._attn_implementation = base.config._attn_implementation
    with torch.device("meta"):
        model = getattr(clamped, family.clamped)(config)
    _share_tensors(model, base)
    for clamp in clamps:
        layer: Any = model.get_decoder().layers[clamp.layer]
        layer.sae_clamp.load_state_dict(
            {
                name: torch.tensor(array, device=base.device)
                for name, array in clamp.tensors.items()
            },
            assign=True,
        )
    return model.train(base.training)


def _share_tensors(model: PreTrainedModel, base: PreTrainedModel) -> None:
    """Let every parameter and buffer of `model` that `base` has be base's own. Changes `model`."""
    for kind in ("_parameters", "_buffers"):
        modules = dict(model.named_modules())
        for path, module in base.named_modules():
            for name, tensor in getattr(module, kind).items():
                getattr(modules[path], kind)[name] = tensor
