"""The operator `ai.bakeout::SAEClamp`, version 1: its schema, and its body as an ONNX function.

A model that holds the function runs in any ONNX Runtime, on any execution provider, without a
library of ours: the runtime puts the body in place of the node. Where somebody registers a kernel
for the operator, the runtime takes that instead. `DOC` is all that a kernel's author needs.
"""

from __future__ import annotations

from typing import Any

import onnx
from onnx import FunctionProto, OperatorSetIdProto
from onnx.defs import OpSchema
from onnxscript import FLOAT, opset20, script
from onnxscript.values import Opset

op: Any = opset20

DOMAIN = "ai.bakeout"
NAME = "SAEClamp"
VERSION = 1
OPSET = 20
"""Of the standard operators, in the function's body and in the graphs that hold it."""

DOC = """\
Sets a few features of a sparse autoencoder (SAE) in the residual stream of a language model.

With k features that are read or set, all arithmetic in float32 whatever the type of `h`:

    x        = float32(h)                                              [batch, seq, d_in]
    pre      = x @ W_enc + b_enc                                       [batch, seq, k]
    a[i]     = max(pre[i], 0) where pre[i] > theta[i], else 0          [batch, seq, k]
    on[i]    = a[i] > trigger[i]              (strict)                 [batch, seq, k]
    gate[j]  = any over i of (route[j, i] and on[i])                   [batch, seq, k]
    a2[j]    = value[j] + scale[j] * a[j] where gate[j], else a[j]     [batch, seq, k]
    delta    = (a2 - a) @ W_dec, and 0 at exempt positions             [batch, seq, d_in]
    output   = x + delta, rounded once to the type of `h`              [batch, seq, d_in]

Where no gate is open, and at exempt positions, the output is `h` bit for bit, except that -0 may
become 0. A comparison with NaN is false, so a NaN in `h` opens no gate; it is passed on.

By the parameters of each row: a constant c (negative clamping, conditional with a trigger above 0)
is value c and scale 0; ablation is value 0 and scale 0; scaling is value 0 and scale 1 - m. With
`route` the identity every feature gates itself. A row of `route` with several columns set is open
when any of these features is on, as for a refusal feature. A row with value 0 and scale 1 is only
read. `b_dec` and every normalisation of the SAE are folded into the tensors beforehand.
"""

_INPUTS = (
    ("h", "T", "Residual stream after the decoder layer: [batch, seq, d_in]."),
    ("exempt", "B", "[batch, seq]; true where h is passed on unchanged (BOS)."),
    ("W_enc", "F", "Encoder columns of the k features: [d_in, k]."),
    ("b_enc", "F", "Encoder bias: [k]."),
    ("theta", "F", "JumpReLU threshold, 0 for ReLU: [k]."),
    ("W_dec", "F", "Decoder rows: [k, d_in]."),
    ("trigger", "F", "A feature is on when its activation is greater; not negative: [k]."),
    ("route", "B", "[k, k]; row: the feature that is set, column: the one that opens its gate."),
    ("value", "F", "Constant part of what a gated feature becomes: [k]."),
    ("scale", "F", "Factor on its activation in what a gated feature becomes: [k]."),
)


def schema() -> OpSchema:
    """The operator's schema, as `onnx.defs.register_schema` takes it."""
    inputs = [OpSchema.FormalParameter(name, kind, text) for name, kind, text in _INPUTS]
    return OpSchema(
        NAME,
        DOMAIN,
        VERSION,
        doc=DOC,
        inputs=inputs,
        outputs=[OpSchema.FormalParameter("output", "T", "As h: [batch, seq, d_in].")],
        type_constraints=[
            (
                "T",
                ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"],
                "Type of the residual stream.",
            ),
            ("F", ["tensor(float)"], "Parameters are float32, always."),
            ("B", ["tensor(bool)"], "Flags."),
        ],
    )


@script(Opset(DOMAIN, VERSION), default_opset=op)
def SAEClamp(  # type: ignore[no-untyped-def]
    h, exempt, W_enc, b_enc, theta, W_dec, trigger, route, value, scale
):
    """The body, line by line as in `DOC`."""
    x = op.Cast(h, to=FLOAT.dtype)
    pre = op.Add(op.MatMul(x, W_enc), b_enc)
    nothing = op.Constant(value_float=0.0)
    a = op.Where(op.Greater(pre, theta), op.Relu(pre), nothing)
    on = op.Cast(op.Greater(a, trigger), to=FLOAT.dtype)
    columns = op.Transpose(op.Cast(route, to=FLOAT.dtype), perm=[1, 0])
    gate = op.Greater(op.MatMul(on, columns), nothing)
    a2 = op.Where(gate, op.Add(value, op.Mul(scale, a)), a)
    moved = op.MatMul(op.Sub(a2, a), W_dec)
    delta = op.Where(op.Unsqueeze(exempt, [-1]), nothing, moved)
    output = op.CastLike(op.Add(x, delta), h)
    return output  # noqa: RET504  (names the output)


def function() -> FunctionProto:
    """The operator's body, to be added to a model's functions."""
    proto: FunctionProto = SAEClamp.to_function_proto()
    proto.doc_string = DOC
    return proto


def opset_imports() -> list[OperatorSetIdProto]:
    """What a model that holds the operator imports."""
    return [onnx.helper.make_opsetid("", OPSET), onnx.helper.make_opsetid(DOMAIN, VERSION)]
