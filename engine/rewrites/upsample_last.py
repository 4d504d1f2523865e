"""A linear map over channels (linear layer or 1 x 1 convolution) of an enlarged picture runs on the small picture.

    W up(x) + b = up(W x + b)        W [y; up(x)] + b = (W1 y + b) + up(W2 x)

Holds because the weights of resizing sum to one. Only where nothing else needs the enlarged picture.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from planmill.engine.rewrites.graph import (
    Call,
    Program,
    argument,
    aten,
    dtype_of,
    is_linear,
    is_node,
    only_user,
    shape_of,
)
from planmill.engine.rewrites.one_upsample import RESIZES, enlarges

_ROWS = (aten.reshape.default, aten.view.default, aten.flatten.using_ints)


class _Site(NamedTuple):
    """Where a linear map meets a picture: [B, C, H, W], or the layers' channels-last view of it."""

    picture: Call
    finish: Callable[[Call], Call]  # from channels-last [B, H, W, O] to what the layer gave


def apply(program: Program) -> int:
    """Rewrite; how often it fired."""
    fired = 0
    for layer in program.calls(aten.linear.default, aten.conv2d.default):
        if layer.target is aten.linear.default and not is_linear(layer):
            continue
        bias = argument(layer, 2, "bias")
        if not program.is_constant(layer.args[1]) or (bias is not None and not program.is_constant(bias)):
            continue
        site = _site(program, layer)
        parts = _parts(site.picture) if site else None
        if site is None or parts is None or any(not isinstance(shape_of(part)[1], int) for part in parts):
            continue
        worth = [part.target in RESIZES and _worth(part, int(shape_of(layer.args[1])[0])) for part in parts]
        if any(worth):
            _move(program, layer, site, parts, worth)
            fired += 1
    return fired


def _site(program: Program, layer: Call) -> _Site | None:
    x = layer.args[0]
    if not is_node(x) or only_user(x) is None:
        return None
    if layer.target is aten.conv2d.default:
        plain = argument(layer, 6, "groups", 1) == 1 and set(argument(layer, 3, "stride", [1])) == {1}
        weight = shape_of(layer.args[1])
        if not plain or tuple(weight[2:]) != (1, 1) or set(argument(layer, 4, "padding", [0])) != {0}:
            return None
        return _Site(x, lambda y: program.emit(layer, aten.permute.default, y, [0, 3, 1, 2]))
    width = shape_of(x)[-1]
    if x.target is aten.transpose.int and set(x.args[1:]) == {1, 2}:
        flat = x.args[0]
        if flat.target is aten.flatten.using_ints and flat.args[1:] in ((2,), (2, -1), (2, 3)) and only_user(flat):
            return _Site(flat.args[0], lambda y: program.emit(layer, aten.flatten.using_ints, y, 1, 2))
        return None
    rows = None
    if x.target in _ROWS:
        rows, x = x, x.args[0]
        kept = is_node(x) and only_user(x) is not None and shape_of(x)[-1] is not None
        if not kept or not isinstance(width, int) or shape_of(x)[-1] != width:
            return None
    if x.target is not aten.permute.default or list(x.args[1]) != [0, 2, 3, 1]:
        return None

    def finish(y: Call) -> Call:
        if rows is None:
            return y
        if rows.target is aten.flatten.using_ints:
            return program.emit(layer, rows.target, y, *rows.args[1:])
        sizes = [*rows.args[1][:-1], shape_of(y)[-1]]
        return program.emit(layer, aten.reshape.default, y, sizes)  # a view may ask for strides that y has not

    return _Site(x.args[0], finish)


def _parts(picture: Call) -> list[Call] | None:
    """What a picture consists of along its channels; None where something else sees it whole, or parts are cast."""
    if only_user(picture) is None or len(shape_of(picture)) != 4:
        return None
    if picture.target is aten.cat.default and argument(picture, 1, "dim", 0) in (1, -3):
        parts = list(picture.args[0])
        return parts if all(dtype_of(part) == dtype_of(picture) for part in parts) else None
    return [picture]


def _worth(part: Call, out: int) -> bool:
    """Nothing else needs the enlarged part, and resizing the result is not more work than resizing the input."""
    return only_user(part) is not None and enlarges(part) and out <= 2 * int(shape_of(part)[1])


def _move(program: Program, layer: Call, site: _Site, parts: list[Call], worth: list[bool]) -> None:
    weight, bias = program.constant(layer.args[1]), program.constant(argument(layer, 2, "bias"))
    assert weight is not None
    dtype = dtype_of(layer.args[1])
    columns = weight.flatten(1).split([int(shape_of(part)[1]) for part in parts], dim=1)
    staying = [index for index, moved in enumerate(worth) if not moved]

    def linear(x: Call, w: torch.Tensor, b: torch.Tensor | None) -> Call:
        last = program.emit(layer, aten.permute.default, x, [0, 2, 3, 1])
        bias = None if b is None else program.emit_constant(layer, b, dtype)
        return program.emit(layer, aten.linear.default, last, program.emit_constant(layer, w, dtype), bias)

    total = None
    if staying:
        kept = [parts[index] for index in staying]
        x = kept[0] if len(kept) == 1 else program.emit(layer, aten.cat.default, kept, 1)
        total, bias = linear(x, torch.cat([columns[index] for index in staying], dim=1), bias), None
    for part, w, moved in zip(parts, columns, worth, strict=True):
        if moved:
            y = program.emit(layer, aten.permute.default, linear(part.args[0], w, bias), [0, 3, 1, 2])
            y = program.emit(layer, part.target, y, *part.args[1:], **part.kwargs)
            y = program.emit(layer, aten.permute.default, y, [0, 2, 3, 1])
            total, bias = (y if total is None else program.emit(layer, aten.add.Tensor, total, y)), None
    assert total is not None
    program.replace(layer, site.finish(total))
