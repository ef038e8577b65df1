"""`genai_config.json`, with which onnxruntime-genai runs the folder as it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

GENAI_CONFIG = "genai_config.json"


def genai_config(config: Any, folder: Path, graph: str) -> dict[str, Any]:
    """What onnxruntime-genai needs to know.

    Args:
        config: the clamped model's.
        folder: the checkpoint, whose generation_config.json says where an answer ends.
        graph: the graph's name in the folder.

    Source: onnxruntime-genai's configuration reference.
    """
    generation: dict[str, Any] = {}
    if (path := folder / "generation_config.json").is_file():
        generation = json.loads(path.read_text(encoding="utf-8"))

    def token(name: str) -> Any:
        return generation.get(name, getattr(config, name, None))

    return {
        "model": {
            "type": config.model_type.removeprefix("clamped_"),
            "bos_token_id": token("bos_token_id"),
            "eos_token_id": token("eos_token_id"),
            "pad_token_id": token("pad_token_id") or 0,
            "context_length": config.max_position_embeddings,
            "vocab_size": config.vocab_size,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": graph,
                "head_size": config.head_dim,
                "hidden_size": config.hidden_size,
                "num_attention_heads": config.num_attention_heads,
                "num_key_value_heads": config.num_key_value_heads,
                "num_hidden_layers": config.num_hidden_layers,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "position_ids": "position_ids",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "do_sample": bool(generation.get("do_sample", False)),
            "temperature": generation.get("temperature", 1.0),
            "top_k": generation.get("top_k", 50),
            "top_p": generation.get("top_p", 1.0),
            "max_length": config.max_position_embeddings,
            "past_present_share_buffer": False,
        },
    }
