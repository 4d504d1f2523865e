"""Dense convolutions of stride one are computed with a quarter of their multiplications, by our C++ kernel.

    W x = A^T [(G W G^T) * (B^T x B)] A    tile by tile (Lavin and Gray, CVPR 2016)

Exact within the rounding of float32, in which it computes. In a 16-bit program it fires where the processor has no
matrix units for them: vector units are twice as fast as float32, and this takes a quarter. A NaN or an infinity in an
image may reach every output of its tile. Only where the sums over channels are long enough, and the
tiles many enough, that transforms and kernels 36 / r^2 times as large do not eat what the products save.
"""

import torch

from planmill.engine.rewrites.graph import Call, Program, argument, aten, dtype_of, shape_of
from planmill.engine.rewrites.halves import Units, rounded, runs_in_float32, widened
from planmill.kernels.common.cpu import extension
from planmill.kernels.convolution.winograd_convolution.transform import SIDE, SIZES, transform_weight

_CHANNELS = 32  # of input and output, at least
_TILES = 16  # of an image, at least


def apply(program: Program) -> int:
    """Rewrite; how often it fired."""
    if extension() is None:  # the op would be its reference
        return 0
    return sum(_replace(program, layer) for layer in program.calls(aten.conv2d.default) if _pays(program, layer))


def _pays(program: Program, layer: Call) -> bool:
    bias = argument(layer, 2, "bias")
    known = program.is_constant(layer.args[1]) and (bias is None or program.is_constant(bias))
    settings = [argument(layer, i, n, d) for i, n, d in ((3, "stride", [1]), (5, "dilation", [1]), (6, "groups", 1))]
    plain = all(value in (1, [1], [1, 1]) for value in settings)
    shape, (outputs, channels, *size) = shape_of(layer), shape_of(layer.args[1])
    if not known or not plain or not runs_in_float32(layer, unless=Units.MATRIX) or len(shape) != 4:
        return False
    if size[0] != size[1] or size[0] not in SIZES or len({*_padding(layer)}) != 1:
        return False
    if not all(isinstance(n, int) for n in shape[2:]):
        return False
    side = SIDE + 1 - size[0]
    tiles = -(-shape[2] // side) * -(-shape[3] // side)
    return min(outputs, channels) >= _CHANNELS and tiles >= _TILES


def _padding(layer: Call) -> list[int]:
    return list(argument(layer, 4, "padding", [0]))


def _replace(program: Program, layer: Call) -> bool:
    weight, bias_node = program.constant(layer.args[1]), argument(layer, 2, "bias")
    if weight is None:
        return False
    bias = program.constant(bias_node)
    transformed = program.emit_constant(layer, transform_weight(weight), torch.float32)
    shift = program.emit_constant(layer, torch.zeros(len(weight)) if bias is None else bias, torch.float32)
    x = widened(program, layer, layer.args[0])
    last = program.emit(layer, aten.permute.default, x, [0, 2, 3, 1])
    last = program.emit(layer, aten.contiguous.default, last)
    op = torch.ops.planmill.winograd_convolution.default
    found = program.emit(layer, op, last, transformed, shift, int(weight.shape[2]), _padding(layer)[0])
    found = program.emit(layer, aten.permute.default, found, [0, 3, 1, 2])
    program.replace(layer, rounded(program, layer, found, dtype_of(layer)))
    return True
