"""An affine step before a padded convolution goes into its weights: the image is padded with what the step makes zero.

    W pad(s x + h) + b = (W s) pad'(x) + (b + W h)        pad' puts -h / s around x: the mean, not zero

Off unless asked for: a library's convolution pads on the way, and the subtraction costs no more than a padded copy.
"""

from typing import Any

import torch

from planmill.engine.rewrites.graph import CONVOLUTIONS, Affine, Call, Program, argument, aten, dtype_of, shape_of
from planmill.engine.rewrites.normalization_into_input import (
    emit_folded,
    fold,
    is_unpadded,
    longest_step,
    takes,
)

_MOST_CHANNELS = 16  # of an image; with more the border is as large as what a network computes with


def apply(program: Program) -> int:
    """Rewrite; how often it fired."""
    fired = 0
    for step in program.calls():
        users = list(step.users)
        if not all(takes(program, user, step) and not is_unpadded(user) for user in users):
            continue
        found = longest_step(program, step, users, True)
        if found is None or not found.shift.any() or not found.scale.all() or len(found.scale) > _MOST_CHANNELS:
            continue
        if (padded := _padded(program, step, users, found)) is None or not (folded := fold(program, users, found)):
            continue
        for user, constants in zip(users, folded, strict=True):
            settings = _settings(user)
            settings[1] = [0] * len(_padding(user))
            program.replace(user, emit_folded(program, user, padded, constants, *settings))
        fired += 1
    return fired


def _settings(user: Call) -> list[Any]:
    """Stride, padding, dilation, groups."""
    ones = [1] * CONVOLUTIONS[user.target]
    defaults = (("stride", ones), ("padding", [0] * len(ones)), ("dilation", ones), ("groups", 1))
    return [argument(user, index, name, default) for index, (name, default) in enumerate(defaults, start=3)]


def _padding(user: Call) -> tuple[int, ...]:
    padding = _settings(user)[1]
    return tuple(padding) * (CONVOLUTIONS[user.target] // len(padding))


def _padded(program: Program, before: Call, users: list[Call], step: Affine) -> Call | None:
    """The source with -h / s around it; None where layers pad differently, or its size is not known."""
    paddings = {_padding(user) for user in users}
    if len(paddings) != 1:
        return None
    (padding,) = paddings
    value = -step.shift / step.scale
    around = [side for size in reversed(padding) for side in (size, size)]
    if bool((value == value[0]).all()):
        return program.emit(before, aten.constant_pad_nd.default, step.source, around, float(value[0]))
    sizes = shape_of(step.source)[-len(padding) :]
    if not all(isinstance(size, int) for size in sizes):
        return None
    inside = torch.zeros(1, *sizes, dtype=torch.bool)
    outside = torch.constant_pad_nd(inside, around, True)
    border = torch.where(outside, value.view(-1, *[1] * len(padding)), 0.0)
    zeros = program.emit(before, aten.constant_pad_nd.default, step.source, around, 0.0)
    return program.emit(before, aten.add.Tensor, zeros, program.emit_constant(before, border, dtype_of(step.source)))
