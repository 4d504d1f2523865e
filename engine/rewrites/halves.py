"""Which steps of a 16-bit program run in float32 on this CPU, and what stands between them and the others."""

import operator
from enum import IntEnum
from typing import Any

import torch

from planmill.engine.layout import arithmetic
from planmill.engine.machine import this_machine
from planmill.engine.rewrites.graph import Call, Program, aten, dtype_of, is_node

HALVES = (torch.bfloat16, torch.float16)
# Steps of few operations a number, and views: what they cost in float32 is no reason to round before them.
_LIGHT = {
    *(aten.relu, aten.relu6, aten.leaky_relu, aten.elu, aten.gelu, aten.silu, aten.hardswish, aten.hardsigmoid),
    *(aten.hardtanh, aten.sigmoid, aten.tanh, aten.clamp, aten.clamp_min, aten.clamp_max, aten.abs, aten.neg),
    *(aten.exp, aten.sqrt, aten.rsqrt, aten.square, aten.pow, aten.reciprocal),
    *(aten.add, aten.sub, aten.rsub, aten.mul, aten.div, aten.maximum, aten.minimum),
    *(aten.avg_pool2d, aten.max_pool2d, aten.adaptive_avg_pool2d, aten.upsample_bilinear2d, aten.upsample_nearest2d),
    *(aten.batch_norm, aten.layer_norm, aten.group_norm, aten.softmax, aten.where, aten.masked_fill),
    *(aten.mean, aten.sum, aten.amax, aten.amin, aten.cat, aten.stack, aten.pad, aten.constant_pad_nd),
    *(aten.permute, aten.transpose, aten.mT, aten.t, aten.reshape, aten.flatten, aten.unflatten, aten.unsqueeze),
    *(aten.squeeze, aten.select, aten.slice, aten.split, aten.split_with_sizes, aten.chunk, aten.unbind),
    *(aten.expand, aten.contiguous, aten.clone, aten.alias),
}


class Units(IntEnum):
    """What a processor multiplies 16-bit numbers with."""

    NONE = 0  # by way of float32
    VECTOR = 1  # twice as fast as float32
    MATRIX = 2  # an order of magnitude faster


_FLAGS = {
    torch.bfloat16: {"amx_bf16": Units.MATRIX, "avx512_bf16": Units.VECTOR, "bf16": Units.VECTOR},
    torch.float16: {"amx_fp16": Units.MATRIX, "avx512_fp16": Units.VECTOR, "fphp": Units.VECTOR},
}


def units(dtype: torch.dtype) -> Units:
    """The best units that this processor has for a 16-bit dtype."""
    return max((best for flag, best in _FLAGS[dtype].items() if flag in this_machine().isa), default=Units.NONE)


def is_half(value: Any) -> bool:
    """Whether what a node gives is a tensor of 16 bits, or some."""
    if isinstance(value, list | tuple):
        return any(map(is_half, value))
    return isinstance(value, torch.Tensor) and value.dtype in HALVES


def runs_in_float32(step: Call, unless: Units) -> bool:
    """Whether a step is float32, or 16 bits for which the processor has not even the units `unless`."""
    dtype = dtype_of(step)
    return dtype == torch.float32 or (dtype in HALVES and units(dtype) < unless)


def rounded(program: Program, before: Call, y: Call, dtype: torch.dtype) -> Call:
    """A float32 tensor in the dtype of the step whose place it takes."""
    if dtype == torch.float32:
        return y
    count_arithmetic(program)
    node = program.emit(before, aten.to.dtype, y, dtype)
    program.roundings.add(node)
    return node


def count_arithmetic(program: Program) -> None:
    """Keep what each call multiplies and adds, as it is when this is first asked for."""
    if not program.arithmetic:
        program.arithmetic = {node: count.total for node, count in arithmetic(program.graph)}


def widened(program: Program, before: Call, x: Call) -> Call:
    """A tensor in float32, from before it was rounded if it can be."""
    if dtype_of(x) == torch.float32:
        return x
    return unrounded(program, x) or program.emit(before, aten.to.dtype, x, torch.float32)


def unrounded(program: Program, x: Call) -> Call | None:
    """A tensor in float32, where light steps alone have made it out of results of ours, inputs and constants."""
    return _emit(program, x, {}) if _is_known(program, x, {}) else None


def _source(program: Program, node: Any) -> Call | None:
    """The float32 tensor, a result of ours or an input, that a node rounds."""
    if not is_node(node) or node.target is not aten.to.dtype or dtype_of(node) not in HALVES:
        return None
    source = node.args[0]
    ours = node in program.roundings or source.op == "placeholder"
    return source if ours and dtype_of(source) == torch.float32 else None


def _is_known(program: Program, node: Call, seen: dict[Call, bool]) -> bool:
    if node not in seen:
        packet = getattr(node.target, "overloadpacket", None)
        other = any(isinstance(x, torch.dtype) for x in (*node.args, *node.kwargs.values()))  # than it is given
        light = (packet in _LIGHT and not other) or node.target is operator.getitem
        seen[node] = (
            not is_half(node.meta["val"])
            or _source(program, node) is not None
            or program.is_constant(node)
            or (light and all(_is_known(program, x, seen) for x in node.all_input_nodes))
        )
    return seen[node]


def _emit(program: Program, node: Call, made: dict[Call, Call]) -> Call:
    """A known node in float32, each step behind the one that it repeats."""
    if not is_half(node.meta["val"]):
        return node
    source = _source(program, node)
    if source is not None:
        return source
    if node not in made:
        value = program.constant(node)
        if value is not None:
            made[node] = program.emit_constant(node, value, torch.float32)
        else:
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda x: _emit(program, x, made))
            made[node] = program.emit(node.next, node.target, *args, **kwargs)
    return made[node]
