"""In a 16-bit program of which steps run in float32, what comes behind them is rounded no more than its end needs.

    float32(f(round(x))) = f(x), but for what rounding x costs

f is made of steps of few operations a number and of views, as in `halves`. Nothing is computed less exactly.
"""

import torch

from planmill.engine.rewrites.graph import Program, aten, dtype_of
from planmill.engine.rewrites.halves import HALVES, unrounded


def apply(program: Program) -> int:
    """Rewrite; how often it fired."""
    fired = 0
    if not program.roundings:  # nothing runs in float32 that did not before
        return fired
    for cast in program.calls(aten.to.dtype):
        if dtype_of(cast) != torch.float32 or dtype_of(cast.args[0]) not in HALVES:
            continue
        exact = unrounded(program, cast.args[0])
        if exact is not None:
            program.replace(cast, exact)
            fired += 1
    return fired
