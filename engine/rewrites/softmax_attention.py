"""Attention without a mask runs in our C++ kernel, which reads heads out of a linear layer's output and writes them as
the next layer reads them, side by side: no copies in between.

    softmax(scale q k^T) v, transposed, and transposed back, which is a view

Whether a model calls PyTorch's function or writes the two products out. Exact within the rounding of float32, in which
it computes; in a 16-bit program it fires where the processor has no matrix units for them.
"""

from collections.abc import Iterator
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

from planmill.engine.rewrites.graph import Call, Program, argument, aten, dtype_of, only_user, shape_of
from planmill.engine.rewrites.halves import Units, rounded, runs_in_float32, widened
from planmill.kernels.common.cpu import extension

_PLAIN = (("attn_mask", None), ("dropout_p", 0.0), ("is_causal", False))
_SOFTMAX = {aten.softmax.int, aten._softmax.default}


class _Attention(NamedTuple):
    """softmax(scale q k^T) v; k is [..., M, D], or [..., D, M] where it is `transposed`."""

    call: Call
    q: Call
    k: Call
    v: Call
    scale: float
    transposed: bool = False


def apply(program: Program) -> int:
    """Rewrite; how often it fired."""
    if extension() is None:  # the op would be its reference
        return 0
    fired = 0
    for found in chain(_called(program), _written_out(program)):
        call = found.call
        q, k, v = (widened(program, call, x) for x in (found.q, found.k, found.v))
        heads = len(shape_of(q)) == 4
        if not heads:  # one head
            q, k, v = (program.emit(call, aten.unsqueeze.default, x, 1) for x in (q, k, v))
        if found.transposed:
            k = program.emit(call, aten.transpose.int, k, 2, 3)
        y = program.emit(call, torch.ops.planmill.softmax_attention.default, q, k, v, found.scale)
        back = (aten.transpose.int, y, 1, 2) if heads else (aten.squeeze.dim, y, 2)
        program.replace(call, rounded(program, call, program.emit(call, *back), dtype_of(call)))
        fired += 1
    return fired


def _called(program: Program) -> Iterator[_Attention]:
    """Calls of scaled_dot_product_attention."""
    for call in program.calls(aten.scaled_dot_product_attention.default):
        q, k, v = call.args[:3]
        plain = all(argument(call, 3 + i, name, default) == default for i, (name, default) in enumerate(_PLAIN))
        if plain and len(shape_of(call)) == 4 and _match(call, shape_of(q), shape_of(k), shape_of(v)):
            scale = argument(call, 6, "scale")
            yield _Attention(call, q, k, v, shape_of(q)[3] ** -0.5 if scale is None else float(scale))


def _written_out(program: Program) -> Iterator[_Attention]:
    """Products of a softmax of a product, seen by nothing else; numbers may scale q, k and the scores."""
    for call in program.calls(aten.matmul.default, aten.bmm.default):
        weights, v = call.args
        if weights.target not in _SOFTMAX or only_user(weights) is not call or not _is_last(weights):
            continue
        scores, factor = _unscaled(program, weights.args[0], weights)
        if scores.target not in (aten.matmul.default, aten.bmm.default) or only_user(scores) is None:
            continue
        (q, of_q), (k, of_k) = (_unscaled(program, x) for x in scores.args)
        if len(shape_of(q)) == len(shape_of(k)) and _match(
            call, shape_of(q), (*shape_of(k)[:-2], shape_of(k)[-1], shape_of(k)[-2]), shape_of(v)
        ):
            yield _Attention(call, q, k, v, factor * of_q * of_k, transposed=True)


def _is_last(softmax: Call) -> bool:
    """Whether a softmax is of the last dimension, and of the dtype that it is given."""
    dim = softmax.args[1] % len(shape_of(softmax))
    return dim == len(shape_of(softmax)) - 1 and dtype_of(softmax) == dtype_of(softmax.args[0])


def _unscaled(program: Program, node: Any, user: Call | None = None) -> tuple[Any, float]:
    """What a node scales by numbers, and their product; only through nodes that no other than `user` sees, if given."""
    factor = 1.0
    while user is None or only_user(node) is user:
        step = program.affine(node)
        if step is None or step.scale.numel() != 1 or bool(step.shift.any()) or not bool(step.scale.isfinite().all()):
            break
        if dtype_of(step.source) != dtype_of(node):  # the number has widened it
            break
        factor *= float(step.scale)
        node, user = step.source, None if user is None else node
    return node, factor


def _match(call: Call, q: Any, k: Any, v: Any) -> bool:
    """Whether the op takes these shapes: nothing is repeated for the samples or heads of another."""
    if not runs_in_float32(call, unless=Units.MATRIX) or not len(q) == len(k) == len(v) or len(q) not in (3, 4):
        return False
    pairs = [(a[i], q[i]) for a in (k, v) for i in range(len(q) - 2)]
    return isinstance(q[-1], int) and q[-1] > 0 and all(statically_known_true(a == b) for a, b in pairs)
