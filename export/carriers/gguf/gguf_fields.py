"""What a GGUF file says of a Gemma beside its weights, and what no GGUF file can say of one.

llama.cpp reads fewer numbers than config.json has and takes the rest from the sizes, so a model
that has them otherwise is refused: it would run, as another model.

Source: llama.cpp, src/models/gemma.cpp, gemma2.cpp and gemma3.cpp; the keys are `gguf`'s.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bake.errors import ExportError, shown
from bake.families import Family, layer_period
from export.carriers.gguf.vocabulary import Vocabulary

ARCHITECTURES = {"gemma": "gemma", "gemma2": "gemma2", "gemma3_text": "gemma3"}
"""What llama.cpp calls a family, by transformers' model_type."""
ACTIVATION = "gelu_pytorch_tanh"
LOCAL_THETA = 10_000.0
"""Rotary base of windowed layers where a file does not state it."""


def check_sayable(name: str, config: Any, family: Family) -> None:
    """Raise ExportError where llama.cpp would compute something else than a config says.

    Args:
        name: of the folder, for messages.
        config: as transformers reads it.
        family: of the model.
    """
    for what, got, expected in _unsayable(config, family):
        raise ExportError(
            f"{name}: {what} is {shown(got)}; llama.cpp knows this family with {expected} only, so "
            "nothing was written. Use the folder itself, or its ONNX graph"
        )


def _unsayable(config: Any, family: Family) -> Iterator[tuple[str, Any, str]]:
    """(field, what it is, what llama.cpp takes), of every field that differs."""
    activation = getattr(config, family.activation_field, None)
    if activation != ACTIVATION:
        yield family.activation_field, activation, ACTIVATION
    if getattr(config, "attention_bias", False):
        yield "attention_bias", True, "false"
    if getattr(config, "use_bidirectional_attention", None):
        yield "use_bidirectional_attention", True, "false"
    if family.layers_27b is not None:
        wanted = config.head_dim
        if config.num_hidden_layers == family.layers_27b:
            wanted = config.hidden_size // config.num_attention_heads
        if config.query_pre_attn_scalar != wanted:
            yield "query_pre_attn_scalar", config.query_pre_attn_scalar, str(wanted)
    caps = [getattr(config, f"{of}_logit_softcapping", None) for of in ("attn", "final")]
    if family.sliding == "alternating" and None in caps:
        yield "attn_logit_softcapping and final_logit_softcapping", caps, "both"
    if family.sliding == "by pattern" and caps != [None, None]:
        yield "attn_logit_softcapping and final_logit_softcapping", caps, "neither"
    for kind, rope in ropes(config).items():
        if rope.get("rope_type", "default") not in ("default", "linear"):
            yield f"rope_type of {kind}", rope["rope_type"], "default and linear"
    local = ropes(config).get("sliding_attention")
    if local is not None and local.get("rope_type", "default") != "default":
        yield "rope_type of sliding_attention", local["rope_type"], "default"
    if family.period is not None and layer_period(config.layer_types, family) is None:
        types = ["W" if kind == "sliding_attention" else "A" for kind in config.layer_types]
        wanted = "every n-th layer seeing all (a compiled folder: compile it again)"
        yield "layer_types (W windowed, A all)", "".join(types), wanted


def ropes(config: Any) -> dict[str, dict[str, Any]]:
    """Rotary parameters by kind of layer; one kind, "all", where there is one."""
    found = config.rope_parameters
    if isinstance(found.get("full_attention"), dict):
        return {kind: found[kind] for kind in ("full_attention", "sliding_attention")}
    return {"all": found}


def add_model(writer: Any, config: Any, family: Family) -> None:
    """The sizes and constants of a model. Changes `writer`, a `gguf.GGUFWriter`."""
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    kinds = ropes(config)
    main = kinds.get("full_attention") or kinds["all"]
    writer.add_rope_freq_base(main["rope_theta"])
    if main.get("rope_type") == "linear":
        import gguf

        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(main["factor"])
    if "sliding_attention" in kinds:
        writer.add_rope_freq_base_swa(kinds["sliding_attention"]["rope_theta"])
    if family.period is not None:
        writer.add_sliding_window(config.sliding_window or config.max_position_embeddings)
        period = layer_period(config.layer_types, family)
        if period != family.period:  # what llama.cpp takes by itself
            writer.add_sliding_window_pattern(period)
    if family.sliding == "alternating":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def add_vocabulary(writer: Any, vocabulary: Vocabulary) -> None:
    """A tokenizer. Changes `writer`."""
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
    else:  # a list of merges has to be there: of one that never happens
        writer.add_token_merges([f"{vocabulary.tokens[0]} {vocabulary.tokens[0]}"])
    writer.add_token_types(vocabulary.kinds)
    writer.add_bos_token_id(vocabulary.bos)
    for add, token in (
        (writer.add_eos_token_id, vocabulary.eos),
        (writer.add_unk_token_id, vocabulary.unk),
        (writer.add_pad_token_id, vocabulary.pad),
        (writer.add_eot_token_id, vocabulary.eot),
    ):
        if token is not None:
            add(token)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)
    if vocabulary.template is not None:
        writer.add_chat_template(vocabulary.template)
