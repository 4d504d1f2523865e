"""Attention without a mask runs in our C++ kernel, which reads heads out of a linear layer's output and writes them as
the next layer reads them, side by side: no copies in between.

    softmax(scale q k^T) v, transposed, and transposed back, which is a view

Exact within the rounding of float32, in which alone it fires: for 16 bits the library has units.
"""

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

from planmill.engine.rewrites.graph import Call, Program, argument, aten, dtype_of, shape_of
from planmill.kernels.common.cpu import extension

_PLAIN = (("attn_mask", None), ("dropout_p", 0.0), ("is_causal", False))


def apply(program: Program) -> int:
    """Rewrite; how often it fired."""
    if extension() is None:  # the op would be its reference
        return 0
    fired = 0
    for call in program.calls(aten.scaled_dot_product_attention.default):
        if not _is_plain(call):
            continue
        q, k, v = call.args[:3]
        scale = argument(call, 6, "scale")
        scale = shape_of(q)[3] ** -0.5 if scale is None else float(scale)
        found = program.emit(call, torch.ops.planmill.softmax_attention.default, q, k, v, scale)
        program.replace(call, program.emit(call, aten.transpose.int, found, 1, 2))
        fired += 1
    return fired


def _is_plain(call: Call) -> bool:
    if dtype_of(call) != torch.float32 or len(shape_of(call)) != 4:
        return False
    if any(argument(call, 3 + i, name, default) != default for i, (name, default) in enumerate(_PLAIN)):
        return False
    q, k, v = (shape_of(x) for x in call.args[:3])  # none is repeated for the samples or heads of another
    pairs = [(q[0], k[0]), (q[0], v[0]), (q[1], k[1]), (q[1], v[1])]
    return isinstance(q[3], int) and q[3] > 0 and all(statically_known_true(a == b) for a, b in pairs)
