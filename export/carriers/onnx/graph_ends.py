"""What goes into a graph and comes out of it: names, types and shapes."""

from __future__ import annotations

from onnx import TensorProto, ValueInfoProto, helper

from export.carriers.onnx.wiring import Architecture

BATCH, SEQ = "batch_size", "sequence_length"
PAST, TOTAL = "past_sequence_length", "total_sequence_length"


def inputs(arch: Architecture, cache: int) -> list[ValueInfoProto]:
    """Tokens, and keys and values of those before them, by the layers that make their own; after
    them, in their form, what fired there of each sequence gate.

    Args:
        arch: how the graph is wired.
        cache: type of the keys and values.
    """
    return [
        helper.make_tensor_value_info("input_ids", TensorProto.INT64, [BATCH, SEQ]),
        helper.make_tensor_value_info("attention_mask", TensorProto.INT64, [BATCH, TOTAL]),
        helper.make_tensor_value_info("position_ids", TensorProto.INT64, [BATCH, SEQ]),
        *_cached(arch, cache, "past_key_values", PAST),
    ]


def outputs(arch: Architecture, cache: int) -> list[ValueInfoProto]:
    """Logits, and keys and values for the tokens that follow. Arguments as `inputs` has them."""
    shape: list[str | int | None] = [BATCH, SEQ, arch.vocab]
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, shape)
    return [logits, *_cached(arch, cache, "present", TOTAL)]


def _cached(arch: Architecture, cache: int, name: str, length: str) -> list[ValueInfoProto]:
    sizes = {
        layer: (arch.n_kv_heads[layer], arch.head_dim[layer])
        for layer in range(arch.n_layers)
        if layer not in arch.borrows
    }
    sizes |= {arch.n_layers + order: sizes[0] for order in range(len(arch.gates))}
    return [
        helper.make_tensor_value_info(
            f"{name}.{layer}.{part}", cache, [BATCH, heads, length, head_dim]
        )
        for layer, (heads, head_dim) in sizes.items()
        for part in ("key", "value")
    ]
