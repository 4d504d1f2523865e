"""What a linear layer reads is laid out as it reads it by the compiler's own loop, with the steps before, and not by a
copy inside the layer.

    W x + b = W contiguous(x) + b

A library copies a transposed picture in 16 bits number by number.
"""

import torch

from planmill.engine.rewrites.graph import Program, aten, is_linear


def apply(program: Program) -> int:
    """Rewrite; how often it fired."""
    fired = 0
    for layer in program.calls(aten.linear.default, torch.ops.planmill.packed_linear.default):
        x = layer.args[0]
        if (layer.target is not aten.linear.default or is_linear(layer)) and not x.meta["val"].is_contiguous():
            layer.replace_input_with(x, program.emit(layer, aten.contiguous.default, x))
            fired += 1
    return fired
