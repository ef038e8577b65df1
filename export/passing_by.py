"""What of a Gemma 4 goes past a clamp by its own design: keys and values that were made before it,
and each token's own embedding, which every layer behind it is given again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bake.families import borrowing_layers


def passing_by(config: Mapping[str, Any], layer: int) -> dict[str, Any]:
    """What goes past a clamp, as fields of a manifest's `ClampEntry`; empty where nothing does.

    Args:
        config: of the base, config.json.
        layer: whose output is clamped.
    """
    text = config.get("text_config") or config
    lent = borrowing_layers(config)
    old_keys = [behind for behind, lender in lent.items() if lender <= layer < behind]
    # transformers gives a Gemma 4 such embeddings where its config does not say whether it has.
    unsaid = 256 if str(text.get("model_type")).endswith("gemma4_text") else 0
    width = text.get("hidden_size_per_layer_input", unsaid)
    fed = width and layer + 1 != text.get("num_hidden_layers")
    return {
        **({"old_keys": old_keys} if old_keys else {}),
        **({"embedded_again": True} if fed else {}),
    }


def said(
    layer: int,
    old_keys: Sequence[int] = (),
    embedded_again: bool = False,
    tau: float | None = None,
) -> list[str]:
    """The same in words, for terminal and card, a line each; and what a gate over the sequence
    lets past.
    """
    lines = []
    if tau is not None:
        lines.append(
            f"the clamp at layer {layer} acts only while more than {tau:g} of the tokens so far "
            "fired: other text in front keeps it from acting"
        )
    if old_keys:
        several = "layers" if len(old_keys) > 1 else "layer"
        lines.append(
            f"{several} {ranges(old_keys)} attend{'s' * (len(old_keys) == 1)} to keys and values "
            f"that were made before the clamp at layer {layer}: of other tokens they see what was "
            "clamped"
        )
    if embedded_again:
        lines.append(
            f"every layer behind the clamp at layer {layer} is given each token's own embedding "
            "again (per-layer embeddings); `bakeout verify --only leak` measures what that takes "
            "back"
        )
    return lines


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers: `3, 5 to 9`."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{p[0]} to {p[-1]}" if len(p) > 1 else str(p[0]) for p in parts)
