"""`genai_config.json`, with which onnxruntime-genai runs the folder as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bake.errors import FolderError
from bake.reading.model_config import wrong_generation
from export.manifest import AGAIN, read_json

GENAI_CONFIG = "genai_config.json"


def genai_config(config: Any, folder: Path, graph: str) -> dict[str, Any]:
    """What onnxruntime-genai needs to know.

    The model runs from this alone. `onnxruntime_genai.Tokenizer` reads the folder's own tokenizer
    files, if they are of one of its kinds: Gemma's (`GemmaTokenizer`) is.

    Args:
        config: the clamped model's.
        folder: the checkpoint, whose generation_config.json says where an answer ends.
        graph: the graph's path in the folder.

    Raises:
        FolderError: generation_config.json cannot be read.

    Source: onnxruntime-genai's configuration reference.
    """
    generation = read_generation_config(folder)

    def stated(name: str, default: Any) -> Any:
        """As transformers has it: what is null there is not stated. genai takes no null."""
        value = generation.get(name)
        return default if value is None else value

    tokens = {
        name: stated(name, getattr(config, name, None))
        for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    clamp = getattr(config, "sae_clamp", None) or {"sites": []}
    n_gates = sum("tau" in site for site in clamp["sites"])
    return {
        "model": {
            "type": config.model_type.removeprefix("clamped_"),
            **{name: value for name, value in tokens.items() if value is not None},
            "context_length": config.max_position_embeddings,
            "vocab_size": config.vocab_size,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": graph,
                "head_size": config.head_dim,
                "hidden_size": config.hidden_size,
                "num_attention_heads": config.num_attention_heads,
                "num_key_value_heads": config.num_key_value_heads,
                # What fired of a sequence gate is kept as if by a further layer.
                "num_hidden_layers": config.num_hidden_layers + n_gates,
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
            "do_sample": stated("do_sample", False),
            "temperature": stated("temperature", 1.0),
            "top_k": stated("top_k", 50),
            "top_p": stated("top_p", 1.0),
            "max_length": config.max_position_embeddings,
            "past_present_share_buffer": False,
        },
    }


def read_generation_config(folder: Path) -> dict[str, Any]:
    """A folder's generation_config.json; empty where there is none.

    Raises:
        FolderError: it cannot be read, or a field is of another type than it has to be.
    """
    path = folder / "generation_config.json"
    stated = read_json(path) if path.is_file() else {}
    if (wrong := wrong_generation(stated)) is not None:
        raise FolderError(f"{path}: {wrong}; {AGAIN}")
    return stated
