"""In a 16-bit program the products that are left run in float32 too: where the processor has no units for 16 bits, and
where so few are left that units would gain nothing.

    float32(f(round(x), round(w))) = f(x, w), but for what rounding x and w costs

So a network whose convolutions Winograd's algorithm takes keeps the numbers of float32 on a processor without matrix
units.
"""

from functools import partial
from typing import Any

import torch

from planmill.engine.rewrites.graph import Call, Program, dtype_of, is_node
from planmill.engine.rewrites.halves import Units, count_arithmetic, is_half, rounded, runs_in_float32, widened

_LITTLE = 0.05  # of all operations: of the time of EfficientAD-M, 16 bits would save a twentieth


def apply(program: Program) -> int:
    """Rewrite; how often it fired."""
    count_arithmetic(program)
    left = [node for node in program.calls() if program.arithmetic.get(node) and _gives_16_bits(node)]
    few = sum(map(program.arithmetic.__getitem__, left)) <= _LITTLE * sum(program.arithmetic.values())
    chosen = [
        node for node in left if runs_in_float32(node, Units.VECTOR) or (few and runs_in_float32(node, Units.MATRIX))
    ]
    for node in chosen:
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), partial(_wide, program, node))
        y = program.emit(node, node.target, *args, **kwargs)
        program.replace(node, rounded(program, node, y, dtype_of(node)))
    return len(chosen)


def _gives_16_bits(node: Call) -> bool:
    value = node.meta["val"]
    return isinstance(value, torch.Tensor) and is_half(value) and node.kwargs.get("dtype") is None


def _wide(program: Program, before: Call, x: Any) -> Any:
    return widened(program, before, x) if is_node(x) and is_half(x.meta["val"]) else x
