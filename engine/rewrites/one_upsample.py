"""Maps that are resized and then added are added first and resized once.

    f(up(x)) + g(up(y)) = up(f(x) + g(y))        f, g affine, constant over the picture

Holds because the weights of resizing sum to one. The affine steps run as they were, only on the small maps: subtracting
a quantile before scaling keeps its digits.
"""

from planmill.engine.rewrites.graph import Call, Program, aten, dtype_of, is_node, only_user, shape_of

RESIZES = {
    aten.upsample_nearest1d.vec: 1,
    aten.upsample_linear1d.vec: 1,
    aten.upsample_nearest2d.vec: 2,
    aten.upsample_bilinear2d.vec: 2,
    aten.upsample_bicubic2d.vec: 2,
    aten.upsample_nearest3d.vec: 3,
    aten.upsample_trilinear3d.vec: 3,
}  # to spatial dimensions
_STEPS = {aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor}


def enlarges(node: Call) -> bool:
    """Whether a resize gives more elements than it takes, sizes known."""
    count = RESIZES[node.target]
    before, after = shape_of(node.args[0])[-count:], shape_of(node)[-count:]
    if not all(isinstance(size, int) for size in (*before, *after)):
        return False
    return all(a >= b for a, b in zip(after, before, strict=True)) and tuple(after) != tuple(before)


def apply(program: Program) -> int:
    """Rewrite; how often it fired."""
    fired = 0
    for total in program.calls(aten.add.Tensor):
        if len(total.args) != 2 or total.kwargs.get("alpha", 1) != 1:
            continue
        first, second = (_chain(program, side) for side in total.args)
        if first is None or second is None:
            continue
        (up, left), (other, right) = first, second
        alike = up.target is other.target and up.args[1:] == other.args[1:] and up.kwargs == other.kwargs
        same = tuple(shape_of(up.args[0])) == tuple(shape_of(other.args[0]))
        if not alike or not same or dtype_of(up) != dtype_of(other) or dtype_of(total) != dtype_of(up):
            continue
        small = [_replay(program, total, u.args[0], steps) for u, steps in ((up, left), (other, right))]
        added = program.emit(total, aten.add.Tensor, *small)
        program.replace(total, program.emit(total, up.target, added, *up.args[1:], **up.kwargs))
        fired += 1
    return fired


def _chain(program: Program, node: Call) -> tuple[Call, list[Call]] | None:
    """The resize below a chain of affine steps that nothing else sees, and the steps, last first."""
    steps: list[Call] = []
    while is_node(node) and only_user(node) is not None:
        if node.target in RESIZES:
            return (node, steps) if enlarges(node) else None
        affine = program.affine(node)
        if affine is None or node.target not in _STEPS or dtype_of(node) != dtype_of(affine.source):
            return None
        if not all(value.isfinite().all() and value.shape[2:].numel() == 1 for value in (affine.scale, affine.shift)):
            return None
        steps.append(node)
        node = affine.source
    return None


def _replay(program: Program, before: Call, x: Call, steps: list[Call]) -> Call:
    for step in reversed(steps):
        args = [x if is_node(arg) and not program.is_constant(arg) else arg for arg in step.args]
        x = program.emit(before, step.target, *args, **step.kwargs)
    return x
