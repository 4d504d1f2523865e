"""Linear layers get their weight packed beforehand and their activation inside, by our C++ kernel; a convolution that
cuts an image into patches becomes such a layer.

    act(W x + b), W in the order in which the product reads it

Exact within the rounding of float32, in which it computes; in a 16-bit program it fires where the processor has no
units for them.
"""

import torch

from planmill.engine.rewrites.graph import Call, Program, argument, aten, dtype_of, is_linear, only_user, shape_of
from planmill.engine.rewrites.halves import Units, rounded, runs_in_float32, widened
from planmill.kernels.common.cpu import extension
from planmill.kernels.linear.packed_linear.packing import pack_weight

_ACTIVATIONS = {aten.relu.default: "relu", aten.silu.default: "silu"}
_GELUS = {"none": "gelu", "tanh": "gelu_tanh"}


def apply(program: Program) -> int:
    """Rewrite; how often it fired."""
    if extension() is None:  # the op would be its reference
        return 0
    fired = 0
    for layer in program.calls(aten.linear.default, aten.conv2d.default):
        bias = argument(layer, 2, "bias")
        known = program.is_constant(layer.args[1]) and (bias is None or program.is_constant(bias))
        if not known or not runs_in_float32(layer, unless=Units.VECTOR) or 0 in shape_of(layer.args[1]):
            continue
        if is_linear(layer):
            _replace_linear(program, layer)
        elif layer.target is aten.conv2d.default and _cuts_patches(layer):
            _replace_patches(program, layer)
        else:
            continue
        fired += 1
    return fired


def _replace_linear(program: Program, layer: Call) -> None:
    last, activation = layer, "none"
    follower = only_user(layer)
    if follower is not None and (found := _activation(follower)) is not None:
        last, activation = follower, found
    program.replace(last, _multiply(program, layer, layer.args[0], activation))


def _activation(node: Call) -> str | None:
    if node.target is aten.gelu.default:
        return _GELUS[argument(node, 1, "approximate", "none")]
    return _ACTIVATIONS.get(node.target)


def _cuts_patches(layer: Call) -> bool:
    size = list(shape_of(layer.args[1])[2:])
    settings = [argument(layer, i, n, d) for i, n, d in ((4, "padding", [0]), (5, "dilation", [1]), (6, "groups", 1))]
    plain = settings[0] in ([0], [0, 0]) and settings[1] in ([1], [1, 1]) and settings[2] == 1
    stride, shape = argument(layer, 3, "stride", [1]), shape_of(layer.args[0])
    if not plain or size not in (stride, 2 * stride) or size == [1, 1] or len(shape) != 4:
        return False
    return all(isinstance(n, int) and n % side == 0 for n, side in zip(shape[2:], size, strict=True))


def _replace_patches(program: Program, layer: Call) -> None:
    channels, below, beside = (int(n) for n in shape_of(layer.args[1])[1:])
    height, width = (int(n) for n in shape_of(layer.args[0])[2:])
    sizes = [-1, channels, height // below, below, width // beside, beside]
    cut = program.emit(layer, aten.reshape.default, layer.args[0], sizes)
    cut = program.emit(layer, aten.permute.default, cut, [0, 2, 4, 1, 3, 5])
    cut = program.emit(layer, aten.flatten.using_ints, cut, 3, 5)
    found = _multiply(program, layer, cut, "none")
    program.replace(layer, program.emit(layer, aten.permute.default, found, [0, 3, 1, 2]))


def _multiply(program: Program, layer: Call, x: Call, activation: str) -> Call:
    weight, bias = program.constant(layer.args[1]), program.constant(argument(layer, 2, "bias"))
    assert weight is not None
    packed = program.emit_constant(layer, pack_weight(weight.flatten(1).float()), torch.float32)
    shift = program.emit_constant(layer, torch.zeros(len(weight)) if bias is None else bias, torch.float32)
    y = program.emit(
        layer, torch.ops.planmill.packed_linear.default, widened(program, layer, x), packed, shift, activation
    )
    return rounded(program, layer, y, dtype_of(layer))
