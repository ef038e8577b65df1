"""The text-generation graph of a clamped Gemma, written from its config.

    input_ids, attention_mask, position_ids, past_key_values.{i}.{key,value}
        -> logits, present.{i}.{key,value}

The residual stream is float32 whatever the weights are stored in. Attention is written out in
standard operators, so that masks hold in prefill, in decode, past the sliding window, and with
padding on either side; ONNX Runtime fuses what it can when it loads the graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from onnx import GraphProto, TensorProto, helper

from export.carriers.onnx.graph_builder import Builder
from export.carriers.onnx.graph_ends import inputs, outputs
from export.carriers.onnx.graph_weights import Weights
from export.carriers.onnx.operator import DOMAIN, NAME
from export.carriers.onnx.positions import masks, rope, sequence_gate
from export.carriers.onnx.topk_operator import NAME as TOPK
from export.carriers.onnx.wiring import Architecture
from export.clamp_sites import CLAMP_TENSORS, TOPK_TENSORS

FLOAT, FLOAT16 = TensorProto.FLOAT, TensorProto.FLOAT16


@dataclass(frozen=True)
class Shared:
    """Values that every layer uses."""

    split_queries: dict[int, str]
    """By head_dim: shape [batch, seq, n_heads, head_dim]."""
    split_keys: dict[tuple[int, int], str]
    """By n_kv_heads and head_dim: shape [batch, seq, n_kv_heads, head_dim]."""
    residual: str
    """Shape [batch, seq, d_in]."""
    scores: str
    """Shape [batch, n_heads, seq, past + seq]."""
    masks: dict[int | None, str]
    """By window: [batch, 1, seq, past + seq], 0 or the least float32."""
    ropes: dict[str, tuple[str, str, int]]
    """Cosine and signed sine, [batch, 1, seq, head_dim], and half of head_dim."""
    exempt: dict[bool, str]
    """By whether a site spares the exempt tokens: [batch, seq] bool."""
    per_layer: str
    """What each layer is given of each token, [rows, n_layers, width]; empty where nothing is."""


class GraphWriter:
    """Writes the graph of one architecture with one kind of weights.

    Args:
        arch: how it is wired.
        weights: where the tensors come from.
        prefix: before the layer's number in tensor names, `model.layers.`.
        head: name of the output matrix, [vocab, d_in].
        biases: names of the biases that exist.
        cache: type of the keys and values that are kept.
        exact: whether the weights are, so that rounding elsewhere is worth avoiding.
    """

    def __init__(
        self,
        arch: Architecture,
        weights: Weights,
        *,
        prefix: str,
        head: str,
        biases: frozenset[str],
        cache: int,
        exact: bool,
    ) -> None:
        self.arch = arch
        self.weights = weights
        self.prefix = prefix
        self.head = head
        self.biases = biases
        self.cache = cache
        self.exact = exact
        self.g = Builder()
        self._kept: dict[int, tuple[str, str]] = {}
        """By layer, its keys and values, past ones included."""

    def write(self) -> GraphProto:
        """The whole graph."""
        g, backbone = self.g, self.prefix.removesuffix("layers.")
        g.scope = "embed"
        ids = g.op("Reshape", "input_ids", g.ints(-1))
        x = self.weights.lookup(g, f"{backbone}embed_tokens.weight", ids)  # [rows, d_in] from here
        x = g.op("Mul", x, g.float(self.arch.d_in**0.5))
        shared = self._shared(self._per_layer(ids, x) if self.arch.per_layer else "")
        for layer in range(self.arch.n_layers):
            x = self._layer(x, layer, shared)
        g.scope = "head"
        logits = self.weights.linear(g, self._norm(x, f"{backbone}norm.weight"), self.head)
        if self.arch.final_softcap is not None:
            logits = self._softcap(logits, self.arch.final_softcap)
        batch_seq = g.op("Concat", g.op("Shape", "input_ids"), g.ints(-1), axis=0)
        g.nodes.append(helper.make_node("Reshape", [logits, batch_seq], ["logits"], name="logits"))
        return helper.make_graph(
            g.nodes,
            "main",
            inputs(self.arch, self.cache),
            outputs(self.arch, self.cache),
            list(g.initializers.values()),
        )

    def _layer(self, x: str, layer: int, shared: Shared) -> str:
        """One decoder layer, and its clamp: [rows, d_in] twice."""
        g, name = self.g, f"{self.prefix}{layer}."
        g.scope = f"layer.{layer}/attention"
        attended = self._attention(self._norm(x, f"{name}input_layernorm.weight"), layer, shared)
        after = f"{name}post_attention_layernorm.weight"
        before_mlp = after
        if self.arch.norms_after:
            attended = self._norm(attended, after)
            before_mlp = f"{name}pre_feedforward_layernorm.weight"
        x = g.op("Add", x, attended)
        g.scope = f"layer.{layer}/mlp"
        m = self._mlp(self._norm(x, before_mlp), f"{name}mlp.")
        if self.arch.norms_after:
            m = self._norm(m, f"{name}post_feedforward_layernorm.weight")
        x = g.op("Add", x, m)
        if self.arch.per_layer:
            x = g.op("Add", x, self._token_again(x, layer, shared.per_layer))
        if self.arch.scaled:
            x = g.op("Mul", x, self.weights.exact(g, f"{name}layer_scalar"))
        if layer not in self.arch.sites:
            return x
        g.scope = f"layer.{layer}/sae_clamp"
        h = g.op("Reshape", x, shared.residual)
        topk = self.arch.topks.get(layer)
        names = CLAMP_TENSORS if topk is None else TOPK_TENSORS
        tensors = [self.weights.exact(g, f"{name}sae_clamp.{tensor}") for tensor in names]
        exempt = shared.exempt[self.arch.sites[layer]]
        if layer in self.arch.gates:
            exempt = self._gated(h, exempt, layer, tensors)
        if topk is None:
            clamped = g.op(NAME, h, exempt, *tensors, domain=DOMAIN)
        else:
            clamped = g.op(TOPK, h, exempt, *tensors, g.ints(topk), domain=DOMAIN)
        return g.op("Reshape", clamped, g.ints(-1, self.arch.d_in))

    def _gated(self, h: str, exempt: str, layer: int, tensors: Sequence[str]) -> str:
        """Where a clamp does not act, its sequence gate shut or the token exempt; writes what fired
        beside the keys and values of the layers.
        """
        g, arch = self.g, self.arch
        g.scope = f"layer.{layer}/sequence_gate"
        W_enc, b_enc, theta, _, trigger, *_ = tensors
        pre = g.op("Add", g.op("MatMul", h, W_enc), b_enc)
        on = g.op("And", g.op("Greater", pre, theta), g.op("Greater", pre, trigger))
        kept = arch.n_layers + list(arch.gates).index(layer)
        shut, fired = sequence_gate(g, on, exempt, f"past_key_values.{kept}.key", arch.gates[layer])
        as_keys = g.op("Expand", fired, g.ints(1, arch.n_kv_heads[0], 1, arch.head_dim[0]))
        for part in ("key", "value"):
            self._with_past(as_keys, f"{kept}.{part}")
        g.scope = f"layer.{layer}/sae_clamp"
        return g.op("Or", exempt, shut)

    def _per_layer(self, ids: str, x: str) -> str:
        """What a Gemma 4 gives each layer of each token: of its id, and of its embedding."""
        g, arch, backbone = self.g, self.arch, self.prefix.removesuffix("layers.")
        split = g.ints(-1, arch.n_layers, arch.per_layer)
        of_id = self.weights.lookup(g, f"{backbone}embed_tokens_per_layer.weight", ids)
        of_id = g.op("Reshape", g.op("Mul", of_id, g.float(arch.per_layer**0.5)), split)
        seen = self.weights.linear(g, x, f"{backbone}per_layer_model_projection.weight")
        seen = g.op("Reshape", g.op("Mul", seen, g.float(arch.d_in**-0.5)), split)
        seen = self._norm(seen, f"{backbone}per_layer_projection_norm.weight")
        return g.op("Mul", g.op("Add", seen, of_id), g.float(2**-0.5))

    def _token_again(self, x: str, layer: int, per_layer: str) -> str:
        """[rows, d_in] twice: what a layer adds of what it is given of each token."""
        g, name = self.g, f"{self.prefix}{layer}."
        gate = self._activation(self.weights.linear(g, x, f"{name}per_layer_input_gate.weight"))
        given = g.op("Gather", per_layer, g.scalar(layer), axis=1)
        m = self.weights.linear(g, g.op("Mul", gate, given), f"{name}per_layer_projection.weight")
        return self._norm(m, f"{name}post_per_layer_input_norm.weight")

    def _mlp(self, x: str, name: str) -> str:
        """[rows, d_in] twice."""
        g = self.g
        gate = self._activation(self.weights.linear(g, x, f"{name}gate_proj.weight"))
        hidden = g.op("Mul", gate, self.weights.linear(g, x, f"{name}up_proj.weight"))
        return self.weights.linear(g, hidden, f"{name}down_proj.weight")

    def _activation(self, x: str) -> str:
        g, kind = self.g, self.arch.activation
        if kind == "silu":
            return g.op("Mul", x, g.op("Sigmoid", x))
        if kind == "relu":
            return g.op("Relu", x)
        return g.op("Gelu", x, approximate="none" if kind == "gelu" else "tanh")

    def _attention(self, x: str, layer: int, shared: Shared) -> str:
        """[rows, d_in] twice; writes the layer's present keys and values."""
        g, arch, name = self.g, self.arch, f"{self.prefix}{layer}.self_attn."
        turns = shared.ropes[arch.ropes[layer]]
        dim, n_kv_heads = arch.head_dim[layer], arch.n_kv_heads[layer]
        q_split, k_split = shared.split_queries[dim], shared.split_keys[n_kv_heads, dim]
        q = self._heads(x, f"{name}q_proj", q_split, f"{name}q_norm.weight", turns)
        if layer not in arch.borrows:
            k = self._heads(x, f"{name}k_proj", k_split, f"{name}k_norm.weight", turns)
            v = self._values(x, layer, k_split)
            k = self._with_past(k, f"{layer}.key")
            v = self._with_past(v, f"{layer}.value")
            self._kept[layer] = k, v
        k, v = self._kept[arch.borrows.get(layer, layer)]
        # Queries that share a key head stand below each other, so keys are not repeated.
        grouped = g.ints(0, n_kv_heads, -1, dim)
        q = g.op("Reshape", g.op("Mul", q, g.float(arch.attention_scale)), grouped)
        scores = g.op("MatMul", q, g.op("Transpose", k, perm=[0, 1, 3, 2]))
        if arch.attention_softcap is not None:
            scores = self._score_softcap(scores, arch.attention_softcap)
        scores = g.op("Reshape", scores, shared.scores)
        shares = g.op("Softmax", g.op("Add", scores, shared.masks[arch.windows[layer]]), axis=-1)
        seen = g.op("Concat", g.ints(0, n_kv_heads, -1), self._total(), axis=0)
        mixed = g.op("MatMul", g.op("Reshape", shares, seen), v)
        mixed = g.op("Reshape", mixed, g.op("Concat", *self._by_heads(dim), axis=0))
        rows = g.op("Transpose", mixed, perm=[0, 2, 1, 3])
        rows = g.op("Reshape", rows, g.ints(-1, arch.n_heads * dim))
        return self._linear(rows, f"{name}o_proj")

    def _values(self, x: str, layer: int, split: str) -> str:
        """[rows, d_in] -> [batch, n_kv_heads, seq, head_dim]."""
        name = f"{self.prefix}{layer}.self_attn."
        keys = self.arch.keys_are_values[layer]
        v = self._heads(x, f"{name}{'k' if keys else 'v'}_proj", split)
        return self._norm(v) if self.arch.scaled else v

    def _heads(
        self,
        x: str,
        name: str,
        shape: str,
        norm: str | None = None,
        turns: tuple[str, str, int] | None = None,
    ) -> str:
        """[rows, d_in] -> [batch, heads, seq, head_dim], normed and turned where asked for."""
        g = self.g
        heads = g.op("Reshape", self._linear(x, name), shape)
        if norm is not None and self.arch.head_norms:
            heads = self._norm(heads, norm)
        heads = g.op("Transpose", heads, perm=[0, 2, 1, 3])
        if turns is None:
            return heads
        cos, signed_sin, half = turns
        first, second = g.op_many("Split", heads, g.ints(half, half), n_outputs=2, axis=-1)
        swapped = g.op("Concat", second, first, axis=-1)
        return g.op("Add", g.op("Mul", heads, cos), g.op("Mul", swapped, signed_sin))

    def _with_past(self, new: str, name: str) -> str:
        """Past and new keys or values, [batch, n_kv_heads, past + seq, head_dim] float32."""
        g, present = self.g, f"present.{name}"
        kept = new if self.cache == FLOAT else g.cast(new, self.cache)
        inputs = [f"past_key_values.{name}", kept]
        g.nodes.append(helper.make_node("Concat", inputs, [present], name=present, axis=2))
        return present if self.cache == FLOAT else g.cast(present, FLOAT)

    def _linear(self, x: str, name: str) -> str:
        bias = f"{name}.bias"
        return self.weights.linear(
            self.g, x, f"{name}.weight", bias if bias in self.biases else None
        )

    def _norm(self, x: str, name: str = "") -> str:
        """Gemma's RMS norm, x / rms(x) * (1 + w), over the last axis; Gemma 4's has w in place of
        1 + w, or nothing where it has no name.
        """
        g, factor = self.g, ""
        if name:
            factor = weight = self.weights.exact(g, name)
        if name and not self.arch.scaled:
            factor = g.once(f"1 + {name}", lambda: g.op("Add", weight, g.float(1.0)))
        mean = g.op("ReduceMean", g.op("Pow", x, g.float(2.0)), g.ints(-1), keepdims=1)
        rms = g.op("Sqrt", g.op("Add", mean, g.float(self.arch.norm_eps)))
        normed = g.op("Div", x, rms)
        return g.op("Mul", normed, factor) if factor else normed

    def _softcap(self, x: str, cap: float) -> str:
        g = self.g
        return g.op("Mul", g.op("Tanh", g.op("Div", x, g.float(cap))), g.float(cap))

    def _score_softcap(self, x: str, cap: float) -> str:
        """The same for attention scores. ONNX Runtime's float32 tanh is off by up to 4 units in the
        last place, times the cap of 50; the softmax behind it makes that the largest error of the
        graph. Where the weights are exact, it is taken in double precision.
        """
        g = self.g
        if not self.exact:
            return self._softcap(x, cap)
        capped = g.op("Tanh", g.cast(g.op("Div", x, g.float(cap)), TensorProto.DOUBLE))
        return g.op("Mul", g.cast(capped, FLOAT), g.float(cap))

    # ----------------------------------------------------------------- what layers share

    def _shared(self, per_layer: str) -> Shared:
        g, arch = self.g, self.arch
        g.scope = "shared"
        batch_seq = g.op("Shape", "input_ids")
        return Shared(
            split_queries={
                dim: g.op("Concat", batch_seq, g.ints(arch.n_heads, dim), axis=0)
                for dim in dict.fromkeys(arch.head_dim)
            },
            split_keys={
                sizes: g.op("Concat", batch_seq, g.ints(*sizes), axis=0)
                for sizes in dict.fromkeys(zip(arch.n_kv_heads, arch.head_dim, strict=True))
            },
            residual=g.op("Concat", batch_seq, g.ints(arch.d_in), axis=0),
            scores=g.op(
                "Concat",
                g.op("Shape", "input_ids", start=0, end=1),
                g.ints(arch.n_heads, -1),
                self._total(),
                axis=0,
            ),
            masks=masks(g, arch.windows, self._total()),
            ropes={name: rope(g, *of) for name, of in arch.inv_freqs.items()},
            exempt={spares: self._exempt(spares) for spares in set(arch.sites.values())},
            per_layer=per_layer,
        )

    def _total(self) -> str:
        """Length of past and new tokens: [1]."""
        g = self.g
        return g.once("total", lambda: g.op("Shape", "attention_mask", start=1, end=2))

    def _by_heads(self, head_dim: int) -> list[str]:
        """Parts of the shape [batch, n_heads, seq, head_dim]."""
        g, arch = self.g, self.arch
        seq = g.once("seq", lambda: g.op("Shape", "input_ids", start=1, end=2))
        return [g.ints(0, arch.n_heads), seq, g.ints(head_dim)]

    def _exempt(self, spares: bool) -> str:
        """Tokens that no clamp touches, by their ids: [batch, seq] bool."""
        g = self.g
        ids = self.arch.exempt_token_ids if spares else ()
        exempt = g.op("Less", "input_ids", g.scalar(0)) if not ids else ""
        for token_id in ids:
            same = g.op("Equal", "input_ids", g.scalar(token_id))
            exempt = g.op("Or", exempt, same) if exempt else same
        return exempt
