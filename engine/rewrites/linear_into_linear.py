"""Two linear layers with nothing between them become one, where that is not more arithmetic.

    W2 (W1 x + b1) + b2 = (W2 W1) x + (W2 b1 + b2)

A narrow layer between two wide ones (a low-rank factorisation) stays as it is.
"""

from planmill.engine.rewrites.graph import Program, argument, aten, dtype_of, fits, is_linear, only_user, shape_of


def apply(program: Program) -> int:
    """Rewrite; how often it fired."""
    fired = 0
    for second in program.calls(aten.linear.default):
        first = second.args[0]
        if not is_linear(first) or not is_linear(second) or only_user(first) is None:
            continue
        nodes = [(layer.args[1], argument(layer, 2, "bias")) for layer in (first, second)]
        if not all(program.is_constant(node) for pair in nodes for node in pair if node is not None):
            continue
        (middle, wide), (out, _) = (shape_of(w) for w, _ in nodes)
        if out * wide > middle * (wide + out):
            continue
        (w1, b1), (w2, b2) = ((program.constant(w), program.constant(b)) for w, b in nodes)
        assert w1 is not None
        assert w2 is not None
        dtype = dtype_of(nodes[1][0])
        parts = [part for part in (None if b1 is None else w2 @ b1, b2) if part is not None]
        merged = [w2 @ w1, *([sum(parts[1:], parts[0])] if parts else [])]
        if not all(fits(value, dtype) for value in merged):
            continue
        weight, bias = [*(program.emit_constant(second, value, dtype) for value in merged), None][:2]
        program.replace(second, program.emit(second, aten.linear.default, first.args[0], weight, bias))
        fired += 1
    return fired
