"""An affine step before an unpadded convolution or a linear layer goes into its weights: normalised images.

    W (s x + h) + b = (W s) x + (b + W h)

With padding the zeros are put around the normalised image, so nothing is folded there, unless the step only scales.
Neither where subtracting first saves digits: in bfloat16, and with a shift far from zero in both the units of x and
those of the result.
"""

import torch

from planmill.engine.rewrites.graph import CONVOLUTIONS, Call, Program, argument, aten, dtype_of, only_user, shape_of

LARGEST_SHIFT = 8.0


def apply(program: Program) -> int:
    """Rewrite; how often it fired."""
    fired = 0
    for step in program.calls():
        users = list(step.users)
        if program.affine(step) is None or not all(_takes(program, user, step) for user in users):
            continue
        dims = {_channel_dim(user) % len(shape_of(step)) for user in users}
        found = _longest(program, step, dims.pop(), all(map(_unpadded, users))) if len(dims) == 1 else None
        if found is None:
            continue
        for user in users:
            _fold(program, user, *found)
        fired += 1
    return fired


def _longest(program: Program, step: Call, dim: int, unpadded: bool) -> tuple[Call, torch.Tensor, torch.Tensor] | None:
    """The longest chain of affine steps down from `step` that can be folded, as one: its source, scale and shift."""
    size, best = shape_of(step)[dim], None
    if not isinstance(size, int):
        return None
    precise = dtype_of(step).itemsize >= 4
    scale, shift, node = torch.ones(size).double(), torch.zeros(size).double(), step
    while (affine := program.affine(node)) is not None and (node is step or only_user(node) is not None):
        found = affine.along(dim, size)
        if found is None or dtype_of(affine.source) != dtype_of(step) or shape_of(affine.source)[dim] != size:
            break
        scale, shift, node = scale * found[0], scale * found[1] + shift, affine.source
        if not shift.any() or (unpadded and precise and _keeps_digits(scale, shift)):
            best = node, scale, shift
    return best


def _takes(program: Program, user: Call, step: Call) -> bool:
    """Whether a node is a convolution or a linear layer of constant weights, with `step` as its input alone."""
    if user.target not in CONVOLUTIONS and user.target is not aten.linear.default:
        return False
    bias = argument(user, 2, "bias")
    known = program.is_constant(user.args[1]) and (bias is None or program.is_constant(bias))
    return user.args[0] is step and known


def _channel_dim(user: Call) -> int:
    return -1 if user.target is aten.linear.default else len(shape_of(user)) - CONVOLUTIONS[user.target] - 1


def _unpadded(user: Call) -> bool:
    padding = 0 if user.target is aten.linear.default else argument(user, 4, "padding", 0)
    return all(size == 0 for size in (padding if isinstance(padding, list | tuple) else [padding]))


def _keeps_digits(scale: torch.Tensor, shift: torch.Tensor) -> bool:
    return bool(((shift.abs() <= LARGEST_SHIFT) | (shift.abs() <= scale.abs())).all())


def _fold(program: Program, user: Call, source: Call, scale: torch.Tensor, shift: torch.Tensor) -> None:
    weight, bias = program.constant(user.args[1]), program.constant(argument(user, 2, "bias"))
    assert weight is not None
    out, per_group = weight.shape[:2]
    groups = len(scale) // per_group
    shape = (groups, 1, per_group, *[1] * (weight.dim() - 2))
    grouped = weight.view(groups, out // groups, *weight.shape[1:])
    moved = (grouped * shift.view(shape)).flatten(2).sum(2).flatten()
    dtype = dtype_of(user.args[1])
    new_weight = program.emit_constant(user, (grouped * scale.view(shape)).view_as(weight), dtype)
    new_bias = program.emit_constant(user, moved if bias is None else moved + bias, dtype)
    new = program.emit(user, user.target, source, new_weight, new_bias, *user.args[3:])
    program.replace(user, new)
