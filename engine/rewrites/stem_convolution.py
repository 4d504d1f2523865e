"""A convolution of an image of few channels is computed with its ReLU and its pooling, by our C++ kernel.

    pool(relu(W * x + b)) row by row

Such a layer is a network's first: it writes the largest tensor of all, only to have it read once. Exact within the
rounding of float32, in which it computes; in a 16-bit program it fires where the processor has no matrix units for
them. What cuts an image into patches is a linear layer, and is left to `packed_linear`.
"""

from typing import Any, NamedTuple

import torch

from planmill.engine.rewrites.graph import Call, Program, argument, aten, dtype_of, only_user, shape_of
from planmill.engine.rewrites.halves import Units, rounded, runs_in_float32, widened
from planmill.kernels.common.cpu import extension
from planmill.kernels.convolution.stem_convolution.packing import PANEL, pack_kernel

_CHANNELS = 8  # of the input, at most: beyond, a library's blocks of channels are full


class _Pool(NamedTuple):
    """The last settings of the op."""

    name: str = "none"
    size: int = 1
    stride: int = 1
    padding: int = 0
    count_include_pad: bool = True


def apply(program: Program) -> int:
    """Rewrite; how often it fired."""
    if extension() is None:  # the op would be its reference
        return 0
    found = [layer for layer in program.calls(aten.conv2d.default) if _is_stem(program, layer)]
    for layer in found:
        _replace(program, layer)
    return len(found)


def _is_stem(program: Program, layer: Call) -> bool:
    bias = argument(layer, 2, "bias")
    known = program.is_constant(layer.args[1]) and (bias is None or program.is_constant(bias))
    if not known or not runs_in_float32(layer, unless=Units.MATRIX) or len(shape_of(layer.args[0])) != 4:
        return False
    stride, padding = _side(argument(layer, 3, "stride", [1])), _side(argument(layer, 4, "padding", [0]))
    plain = _side(argument(layer, 5, "dilation", [1])) == 1 and argument(layer, 6, "groups", 1) == 1
    if stride is None or padding is None or not plain:
        return False
    outputs, channels, *size = shape_of(layer.args[1])
    cuts_patches = size == [stride, stride] and padding == 0
    return 0 < channels <= _CHANNELS and outputs >= PANEL and min(size) > 1 and not cuts_patches


def _side(value: Any) -> int | None:
    """A setting that is the same for both sides, and a number."""
    sides = {*value} if isinstance(value, list | tuple) else {value}
    side = sides.pop() if len(sides) == 1 else None
    return side if isinstance(side, int) else None


def _pool(node: Call) -> _Pool | None:
    """The pooling that a node is, if the op has it."""
    if node.target not in (aten.avg_pool2d.default, aten.max_pool2d.default):
        return None
    size, stride = _side(node.args[1]), argument(node, 2, "stride", []) or node.args[1]
    found, padding, ceil_mode = _side(stride), _side(argument(node, 3, "padding", 0)), False
    if size is None or found is None or padding is None:
        return None
    if node.target is aten.max_pool2d.default:
        dilation, ceil_mode = _side(argument(node, 4, "dilation", 1)), argument(node, 5, "ceil_mode", False)
        return _Pool("max", size, found, padding) if dilation == 1 and not ceil_mode else None
    ceil_mode, counted = argument(node, 4, "ceil_mode", False), argument(node, 5, "count_include_pad", True)
    if ceil_mode or argument(node, 6, "divisor_override") is not None:
        return None
    return _Pool("average", size, found, padding, counted)


def _replace(program: Program, layer: Call) -> None:
    last, activation, pool = layer, "none", _Pool()
    follower = only_user(last)
    if follower is not None and follower.target is aten.relu.default:
        last, activation, follower = follower, "relu", only_user(follower)
    if follower is not None and (found := _pool(follower)) is not None:
        last, pool = follower, found
    weight, bias = program.constant(layer.args[1]), program.constant(argument(layer, 2, "bias"))
    assert weight is not None
    packed = program.emit_constant(layer, pack_kernel(weight), torch.float32)
    shift = program.emit_constant(layer, torch.zeros(len(weight)) if bias is None else bias, torch.float32)
    stride, padding = _side(argument(layer, 3, "stride", [1])), _side(argument(layer, 4, "padding", [0]))
    op = torch.ops.planmill.stem_convolution.default
    x = widened(program, layer, layer.args[0])
    y = program.emit(layer, op, x, packed, shift, stride, padding, activation, *pool)
    y = program.emit(layer, aten.permute.default, y, [0, 3, 1, 2])
    program.replace(last, rounded(program, layer, y, dtype_of(layer)))
