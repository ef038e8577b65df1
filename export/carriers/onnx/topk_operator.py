"""The operator `ai.bakeout::SAETopKClamp`, version 1: `SAEClamp` of a TopK SAE, encoder and all."""

from __future__ import annotations

from onnx import FunctionProto
from onnx.defs import OpSchema
from onnxscript import FLOAT, script
from onnxscript.values import Opset

from export.carriers.onnx.operator import DOMAIN, VERSION, op, schema

NAME = "SAETopKClamp"
CHUNK = 4096
"""Features among which the largest are looked for at once, and then among those of all chunks."""

DOC = """\
Sets a few features of a TopK sparse autoencoder (SAE) in the residual stream of a language model.

As SAEClamp, but that d_sae features decide together which of them are active. The k features that
are read or set are the first of them. All arithmetic in float32 whatever the type of `h`:

    x        = float32(h)                                              [batch, seq, d_in]
    pre      = (x @ W_enc) * gain + b_enc                              [batch, seq, d_sae]
    least    = the topk-th largest of pre                              [batch, seq, 1]
    a[i]     = max(pre[i], 0) where pre[i] >= least, else 0            [batch, seq, k]
    on, gate, a2, delta, output: as SAEClamp has them

What equals the topk-th largest is active too.
"""

_INPUTS = (
    ("W_enc", "F", "Encoder of all features, the k features first: [d_in, d_sae]."),
    ("b_enc", "F", "Encoder bias: [d_sae]."),
    ("gain", "F", "What x @ W_enc is multiplied by: [d_sae]."),
)


def topk_schema() -> OpSchema:
    """The operator's schema, as `onnx.defs.register_schema` takes it."""
    plain = schema()
    own = {name: OpSchema.FormalParameter(name, kind, text) for name, kind, text in _INPUTS}
    inputs = [own.get(of.name, of) for of in plain.inputs]
    inputs[inputs.index(next(of for of in inputs if of.name == "theta"))] = own["gain"]
    topk = OpSchema.FormalParameter("topk", "I", "How many features are active: [1].")
    kinds = [
        (of.type_param_str, of.allowed_type_strs, "As SAEClamp.") for of in plain.type_constraints
    ]
    return OpSchema(
        NAME,
        DOMAIN,
        VERSION,
        doc=DOC,
        inputs=[*inputs, topk],
        outputs=list(plain.outputs),
        type_constraints=[*kinds, ("I", ["tensor(int64)"], "A number of features.")],
    )


@script(Opset(DOMAIN, VERSION), default_opset=op)
def SAETopKClamp(  # type: ignore[no-untyped-def]
    h, exempt, W_enc, b_enc, gain, W_dec, trigger, route, value, scale, topk
):
    """The body, line by line as in `DOC`; the largest are looked for chunk by chunk."""
    x = op.Cast(h, to=FLOAT.dtype)
    pre = op.Add(op.Mul(op.MatMul(x, W_enc), gain), b_enc)
    chunk = op.Constant(value_ints=[CHUNK])
    lacking = op.Mod(op.Neg(op.Shape(b_enc)), chunk)
    before = op.Constant(value_ints=[0])
    last = op.Constant(value_ints=[-1])
    lowest = op.Constant(value_float=float("-inf"))
    padded = op.Pad(pre, op.Concat(before, lacking, axis=0), lowest, last)
    chunks = op.Reshape(padded, op.Constant(value_ints=[0, 0, -1, CHUNK]))
    best, _ = op.TopK(chunks, op.Min(topk, chunk), axis=-1)
    of_all, _ = op.TopK(op.Reshape(best, op.Constant(value_ints=[0, 0, -1])), topk, axis=-1)
    least = op.ReduceMin(of_all, last, keepdims=1)
    read = op.Slice(pre, before, op.Shape(value), last)
    nothing = op.Constant(value_float=0.0)
    a = op.Where(op.GreaterOrEqual(read, least), op.Relu(read), nothing)
    on = op.Cast(op.Greater(a, trigger), to=FLOAT.dtype)
    columns = op.Transpose(op.Cast(route, to=FLOAT.dtype), perm=[1, 0])
    gate = op.Greater(op.MatMul(on, columns), nothing)
    a2 = op.Where(gate, op.Add(value, op.Mul(scale, a)), a)
    moved = op.MatMul(op.Sub(a2, a), W_dec)
    delta = op.Where(op.Unsqueeze(exempt, [-1]), nothing, moved)
    output = op.CastLike(op.Add(x, delta), h)
    return output  # noqa: RET504  (names the output)


def topk_function() -> FunctionProto:
    """The operator's body, to be added to a model's functions."""
    proto: FunctionProto = SAETopKClamp.to_function_proto()
    proto.doc_string = DOC
    return proto
