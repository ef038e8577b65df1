"""Small GGUF files of made-up Gemmas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")
CHARACTERS = [*"abcdefghijklmnopqrstuvwxyzABCD\n.,?!'", "\u2581", "ab", "\u2581a"]
VOCAB = [*TOKENS, *(f"<0x{byte:02X}>" for byte in range(256)), *CHARACTERS]
CONTROL, BYTE, NORMAL = 3, 6, 1
QUANTISED = "Q8_0"


def gguf_config(architecture: str) -> Any:
    """A config of which every number can be said in GGUF."""
    import transformers as tf

    kind = {"gemma2": tf.Gemma2Config, "gemma3": tf.Gemma3TextConfig}[architecture]
    return kind(
        vocab_size=len(VOCAB),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=256,
        sliding_window=16,
        query_pre_attn_scalar=256,
    )


def write_gguf(
    file: Path,
    architecture: str = "gemma3",
    *,
    called: str | None = None,
    without: str | None = None,
    tokens: bool = True,
    template: str | None = None,
    factor: float | None = None,
    layers: int | None = None,
    stored: str = QUANTISED,
) -> Path:
    """A random model as llama.cpp would write it.

    Args:
        file: to write.
        architecture: gemma2 or gemma3.
        called: what the file says instead.
        without: a tensor that is left out.
        tokens: whether there is a tokenizer.
        template: a chat template.
        factor: by which positions are scaled.
        layers: how many the file says that there are, where it lies.
        stored: what matrices are stored as; I8 is nothing that a matrix can be read from.
    """
    import gguf
    from transformers import AutoModelForCausalLM

    config = gguf_config(architecture)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.data.normal_(std=0.3)
    names = gguf.get_tensor_name_map(
        next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == architecture),
        config.num_hidden_layers,
    )
    writer = gguf.GGUFWriter(file, called or architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(layers or config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(20_000.0)
    writer.add_sliding_window(config.sliding_window)
    if factor is not None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(factor)
    if tokens:
        writer.add_tokenizer_model("llama")
        writer.add_token_list(VOCAB)
        writer.add_token_scores(
            [-1000.0] * len(TOKENS) + [-float(i) for i in range(len(VOCAB) - 6)]
        )
        bytes_end = len(TOKENS) + 256
        kinds = [CONTROL] * len(TOKENS) + [BYTE] * 256 + [NORMAL] * (len(VOCAB) - bytes_end)
        writer.add_token_types(kinds)
        writer.add_bos_token_id(2)
        writer.add_eos_token_id(1)
        writer.add_unk_token_id(3)
        writer.add_pad_token_id(0)
    if template is not None:
        writer.add_chat_template(template)
    for name, parameter in model.named_parameters():
        stem, _, suffix = name.rpartition(".")
        values = parameter.detach().numpy()
        found = f"{names.get_name(stem)}.{suffix}"
        if found == without:
            continue
        if values.ndim == 1:
            writer.add_tensor(found, (values + 1).astype(np.float32))
        else:
            kind = gguf.GGMLQuantizationType[stored]
            data = values.astype(np.int8) if stored == "I8" else gguf.quantize(values, kind)
            writer.add_tensor(found, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
