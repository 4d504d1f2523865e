"""An affine step before an unpadded convolution or a linear layer goes into its weights: normalised images.

    W (s x + h) + b = (W s) x + (b + W h)

With padding the zeros are put around the normalised image, so nothing is folded there, unless the step only scales
(`normalization_into_padding` puts the mean around the image).
Neither where subtracting first saves digits: in bfloat16, and with a shift far from zero in both the units of x and
those of the result.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

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

LARGEST_SHIFT = 8.0


class Folded(NamedTuple):
    """Weights and bias of a layer that takes x in place of scale * x + shift; float64."""

    weight: torch.Tensor
    bias: torch.Tensor


def apply(program: Program) -> int:
    """Rewrite; how often it fired."""
    fired = 0
    for step in program.calls():
        users = list(step.users)
        if not all(takes(program, user, step) for user in users):
            continue
        found = longest_step(program, step, users, all(map(is_unpadded, users)))
        if found is None or not (folded := fold(program, users, found)):
            continue
        for user, constants in zip(users, folded, strict=True):
            program.replace(user, emit_folded(program, user, found.source, constants, *user.args[3:]))
        fired += 1
    return fired


def longest_step(program: Program, step: Call, users: Sequence[Call], shifts: bool) -> Affine | None:
    """The longest chain of affine steps down from `step` that can be folded, as one; its scale and shift are [C].

    Args:
        program: holds them.
        step: the last of the chain.
        users: all that use it; each `takes` it.
        shifts: whether a shift can be folded at all.
    """
    dims = {_channel_dim(user) % len(shape_of(step)) for user in users}
    if len(dims) != 1:
        return None
    (dim,) = dims
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
        if not shift.any() or (shifts and precise and _keeps_digits(scale, shift)):
            best = Affine(node, scale, shift)
    return best


def takes(program: Program, user: Call, step: Call) -> bool:
    """Whether a node is a convolution or a linear layer of constant weights, with `step` as its input alone."""
    if user.target not in CONVOLUTIONS and not is_linear(user):
        return False
    bias = argument(user, 2, "bias")
    known = program.is_constant(user.args[1]) and (bias is None or program.is_constant(bias))
    return user.args[0] is step and known


def _channel_dim(user: Call) -> int:
    return -1 if user.target is aten.linear.default else len(shape_of(user)) - CONVOLUTIONS[user.target] - 1


def is_unpadded(user: Call) -> bool:
    """Whether a layer puts nothing around its input."""
    padding = 0 if user.target is aten.linear.default else argument(user, 4, "padding", 0)
    return all(size == 0 for size in (padding if isinstance(padding, list | tuple) else [padding]))


def _keeps_digits(scale: torch.Tensor, shift: torch.Tensor) -> bool:
    return bool(((shift.abs() <= LARGEST_SHIFT) | (shift.abs() <= scale.abs())).all())


def fold(program: Program, users: Sequence[Call], step: Affine) -> list[Folded]:
    """The constants of each layer with a step in them; none where those of one do not fit its dtype."""
    found = [_fold(program, user, step.scale, step.shift) for user in users]
    fit = (fits(value, dtype_of(user.args[1])) for user, both in zip(users, found, strict=True) for value in both)
    return found if all(fit) else []


def _fold(program: Program, user: Call, scale: torch.Tensor, shift: torch.Tensor) -> Folded:
    weight, bias = program.constant(user.args[1]), program.constant(argument(user, 2, "bias"))
    assert weight is not None
    out, per_group = weight.shape[:2]
    groups = len(scale) // per_group
    shape = (groups, 1, per_group, *[1] * (weight.dim() - 2))
    grouped = weight.view(groups, out // groups, *weight.shape[1:])
    moved = (grouped * shift.view(shape)).flatten(2).sum(2).flatten()
    return Folded((grouped * scale.view(shape)).view_as(weight), moved if bias is None else moved + bias)


def emit_folded(program: Program, user: Call, source: Call, constants: Folded, *settings: Any) -> Call:
    """A layer like `user` on `source`."""
    emitted = [program.emit_constant(user, value, dtype_of(user.args[1])) for value in constants]
    return program.emit(user, user.target, source, *emitted, *settings)
