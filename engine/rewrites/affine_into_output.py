"""An affine step per output channel after a convolution or a linear layer goes into its weights: batch norm in eval
mode, a teacher's statistics.

    s (W x + b) + h = (s W) x + (s b + h)

Only where nothing else sees the layer's own result. A widening cast between the two stays, behind the layer.
"""

from planmill.engine.rewrites.graph import (
    CONVOLUTIONS,
    Affine,
    Call,
    Program,
    argument,
    aten,
    dtype_of,
    fits,
    is_linear,
    only_user,
    shape_of,
)


def apply(program: Program) -> int:
    """Rewrite; how often it fired."""
    fired = 0
    for step in program.calls():
        affine = program.affine(step)
        if affine is not None and _fold(program, step, affine):
            fired += 1
    return fired


def _fold(program: Program, step: Call, affine: Affine) -> bool:
    layer = affine.source
    if only_user(layer) is None:  # the norm of a functional graph is two nodes, each with one user
        return False
    if layer.target is aten.to.dtype and dtype_of(layer).itemsize > dtype_of(layer.args[0]).itemsize:
        layer = layer.args[0]
        if only_user(layer) is None:
            return False
    if layer.target not in CONVOLUTIONS and not is_linear(layer):
        return False
    bias_node = argument(layer, 2, "bias")
    if not program.is_constant(layer.args[1]) or (bias_node is not None and not program.is_constant(bias_node)):
        return False
    rank = len(shape_of(layer))
    dim = rank - 1 if layer.target is aten.linear.default else rank - CONVOLUTIONS[layer.target] - 1
    found = affine.along(dim, int(shape_of(layer.args[1])[0]))
    weight, bias = program.constant(layer.args[1]), program.constant(bias_node)
    if found is None or weight is None:
        return False
    scale, shift = found
    dtype = dtype_of(layer.args[1])
    weight = weight * scale.view(-1, *[1] * (weight.dim() - 1))
    bias = shift if bias is None else scale * bias + shift
    if not fits(weight, dtype) or not fits(bias, dtype):
        return False
    constants = [program.emit_constant(step, value, dtype) for value in (weight, bias)]
    new = program.emit(step, layer.target, layer.args[0], *constants, *layer.args[3:])
    if dtype_of(new) != dtype_of(step):
        new = program.emit(step, aten.to.dtype, new, dtype_of(step))
    program.replace(step, new)
    return True
