"""The Gemma families that are supported: every fact of a family that code depends on, once.

To add one: an entry here, and its classes in `bake/modeling_clamped_gemma.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

GEMMA_BOS = 2
"""BOS id of every Gemma, and transformers' default where a config does not state it."""
START_OF_TURN, END_OF_TURN = "<start_of_turn>", "<end_of_turn>"
"""What begins and ends a turn in every Gemma before 4 that chats: the second is, of some, an end
that no config names."""
LATER_TURNS = {START_OF_TURN: "<|turn>", END_OF_TURN: "<turn|>"}
"""What Gemma 4 has in their place. Source: Google's prompt formatting of Gemma 4."""


@dataclass(frozen=True)
class Family:
    """One family, by the `model_type` of its config.json."""

    architecture: str
    """transformers' class."""
    clamped: str
    """Our class, in modeling_clamped_gemma.py."""
    clamped_model: str
    """Our class without the head, there too: what AutoModel gives, for hidden states."""
    config: str
    """Our config class, there too."""
    model_type: str
    """Our `model_type`."""
    rope: str
    """transformers' class of rotary embeddings, in the module of `architecture`."""
    sliding: Literal["never", "alternating", "by pattern"] = "by pattern"
    """Which layers see a window only, where the config does not list them: none, every other one
    beginning with the first, or all but each `sliding_window_pattern`-th."""
    period: int | None = None
    """Every how many-th layer sees all, in runtimes that count layers: llama.cpp, MLX and others.
    None: every one does."""
    activation_field: str = "hidden_activation"
    """The config's name for the MLP's activation."""
    norms_after: bool = True
    """A block's output has a norm of its own before it is added."""
    head_norms: bool = True
    """Queries and keys have a norm of their own; and windowed layers other rotary frequencies."""
    layers_27b: int | None = None
    """By this many layers llama.cpp knows the family's 27B, and divides attention scores by the
    root of the hidden size per head; at any other count by the head size's. None: it never does."""
    images: bool = False
    """It takes images too: clamped and as an adapter only, neither compiled nor in ONNX."""
    scaled: bool = False
    """A norm multiplies by w and not 1 + w, and a layer's output by a scalar of its own; layers may
    differ in their heads. Not trained to forget, nor written as GGUF; compiled if it is dense."""
    genai: bool = True
    """onnxruntime-genai runs its graph: it takes heads of one size alone."""
    auto_classes: tuple[str, ...] = ("AutoModelForCausalLM",)
    """Auto classes of transformers that load it, besides AutoModel."""

    @property
    def backbone(self) -> str:
        """What stands before `layers` in the module names of transformers' base model."""
        return "language_model." if self.images else ""


FAMILIES: dict[str, Family] = {
    "gemma": Family(
        architecture="GemmaForCausalLM",
        clamped="ClampedGemmaForCausalLM",
        clamped_model="ClampedGemmaModel",
        config="ClampedGemmaConfig",
        model_type="clamped_gemma",
        rope="GemmaRotaryEmbedding",
        sliding="never",
        activation_field="hidden_act",
        norms_after=False,
        head_norms=False,
    ),
    "gemma2": Family(
        architecture="Gemma2ForCausalLM",
        clamped="ClampedGemma2ForCausalLM",
        clamped_model="ClampedGemma2Model",
        config="ClampedGemma2Config",
        model_type="clamped_gemma2",
        rope="Gemma2RotaryEmbedding",
        sliding="alternating",
        period=2,
        head_norms=False,
        layers_27b=46,
    ),
    "gemma3_text": Family(
        architecture="Gemma3ForCausalLM",
        clamped="ClampedGemma3ForCausalLM",
        clamped_model="ClampedGemma3TextModel",
        config="ClampedGemma3TextConfig",
        model_type="clamped_gemma3_text",
        rope="Gemma3RotaryEmbedding",
        period=6,
        layers_27b=62,
    ),
    "gemma3": Family(
        architecture="Gemma3ForConditionalGeneration",
        clamped="ClampedGemma3ForConditionalGeneration",
        clamped_model="ClampedGemma3Model",
        config="ClampedGemma3Config",
        model_type="clamped_gemma3",
        rope="Gemma3RotaryEmbedding",
        images=True,
        auto_classes=("AutoModelForCausalLM", "AutoModelForImageTextToText"),
    ),
    "gemma4_text": Family(
        architecture="Gemma4ForCausalLM",
        clamped="ClampedGemma4ForCausalLM",
        clamped_model="ClampedGemma4TextModel",
        config="ClampedGemma4TextConfig",
        model_type="clamped_gemma4_text",
        rope="Gemma4TextRotaryEmbedding",
        scaled=True,
        genai=False,
    ),
    "gemma4": Family(
        architecture="Gemma4ForConditionalGeneration",
        clamped="ClampedGemma4ForConditionalGeneration",
        clamped_model="ClampedGemma4Model",
        config="ClampedGemma4Config",
        model_type="clamped_gemma4",
        rope="Gemma4TextRotaryEmbedding",
        images=True,
        scaled=True,
        auto_classes=("AutoModelForCausalLM", "AutoModelForImageTextToText"),
    ),
    "gemma4_unified_text": Family(
        architecture="Gemma4UnifiedForCausalLM",
        clamped="ClampedGemma4UnifiedForCausalLM",
        clamped_model="ClampedGemma4UnifiedTextModel",
        config="ClampedGemma4UnifiedTextConfig",
        model_type="clamped_gemma4_unified_text",
        rope="Gemma4UnifiedTextRotaryEmbedding",
        scaled=True,
        genai=False,
    ),
    "gemma4_unified": Family(
        architecture="Gemma4UnifiedForConditionalGeneration",
        clamped="ClampedGemma4UnifiedForConditionalGeneration",
        clamped_model="ClampedGemma4UnifiedModel",
        config="ClampedGemma4UnifiedConfig",
        model_type="clamped_gemma4_unified",
        rope="Gemma4UnifiedTextRotaryEmbedding",
        images=True,
        scaled=True,
        auto_classes=("AutoModelForCausalLM", "AutoModelForImageTextToText"),
    ),
}
"""The table."""


def family_of(model_type: str) -> Family:
    """The family of a stock model_type or of ours.

    Raises:
        KeyError: there is none.
    """
    return FAMILIES[model_type.removeprefix("clamped_")]


def layer_period(types: Sequence[str], family: Family) -> int | None:
    """The p where the p-th, 2p-th, … layers see all and no others do: the family's own where that
    is one, else the least; None where there is none.

    Args:
        types: of the layers, as config.json lists them.
        family: of the model.
    """
    sees_all = [kind == "full_attention" for kind in types]
    tried: list[int] = list(range(1, len(sees_all) + 1))
    if family.period is not None:
        tried.insert(0, family.period)
    for period in tried:
        if all(sees == (i % period == period - 1) for i, sees in enumerate(sees_all)):
            return period
    return None


def borrowing_layers(config: Mapping[str, Any]) -> dict[int, int]:
    """The layers of a Gemma 4 that attend to keys and values of an earlier layer, and which that
    is: the last one of their kind that makes its own.

    Args:
        config: of the model, or of its language model, as config.json states it or transformers
            fills it.
    """
    text = config.get("text_config") or config
    n, shared = text.get("num_hidden_layers") or 0, text.get("num_kv_shared_layers") or 0
    kinds = list(text.get("layer_types") or [])
    if not kinds:  # as transformers fills it
        kinds = ["full_attention" if i % 6 == 5 else "sliding_attention" for i in range(n)]
    kinds[-1:] = ["full_attention"]
    own = kinds[: n - shared] if 0 < shared < n == len(kinds) else []
    lenders = {kind: layer for layer, kind in enumerate(own)}
    behind = kinds[len(own) :] if own else []
    return {len(own) + i: lenders[kind] for i, kind in enumerate(behind) if kind in lenders}


def own_heads(config: Mapping[str, Any], layer: int) -> dict[str, int]:
    """head_dim and num_key_value_heads of a Gemma 4's layer, where they are others than the config
    states for all layers.

    Args:
        config: of the model, or of its language model, as config.json states it.
        layer: which.
    """
    text = config.get("text_config") or config
    if "per_layer_config" in text:  # where it is null there is none, and nothing is filled in
        each = (text["per_layer_config"] or {}).items()
        return next((dict(own) for number, own in each if int(number) == layer), {})
    kinds = text.get("layer_types") or []
    if not str(text.get("model_type")).removeprefix("clamped_").startswith("gemma4"):
        return {}
    if layer >= len(kinds) or kinds[layer] != "full_attention":
        return {}
    groups = text.get("num_global_key_value_heads") if text.get("attention_k_eq_v") else None
    own = {"head_dim": text.get("global_head_dim") or 512, "num_key_value_heads": groups}
    return {name: size for name, size in own.items() if size is not None}


def unread_tensors(config: Mapping[str, Any]) -> re.Pattern[str]:
    """The names of tensors that a checkpoint may hold and transformers does not load: keys and
    values of layers that borrow theirs.
    """
    layers = "|".join(map(str, borrowing_layers(config))) or "none"
    return re.compile(rf"(?:.*\.)?layers\.(?:{layers})\.self_attn\.[kv]_(?:proj|norm)\.\w+")


def text_families() -> str:
    """The model_types of those without images, for messages."""
    return ", ".join(name for name, family in FAMILIES.items() if not family.images)
