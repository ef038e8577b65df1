"""The Gemma families that are supported: every fact of a family that code depends on, once.

To add one: an entry here, and its classes in `bake/modeling_clamped_gemma.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

GEMMA_BOS = 2
"""BOS id of every Gemma, and transformers' default where a config does not state it."""
END_OF_TURN = "<end_of_turn>"
"""What ends a turn in every Gemma that chats: of some, an end that no config names."""


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


def text_families() -> str:
    """The model_types of those without images, for messages."""
    return ", ".join(name for name, family in FAMILIES.items() if not family.images)
