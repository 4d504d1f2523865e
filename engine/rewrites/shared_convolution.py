"""Convolutions of one input with equal settings become one, its result split.

    [W1; W2] x + [b1; b2] = [W1 x + b1; W2 x + b2]

Steps that follow each of them alike, one by one (ReLU, average pooling), run before the split.
"""

from collections import defaultdict

import torch

from planmill.engine.rewrites.graph import CONVOLUTIONS, Call, Program, argument, aten, dtype_of, only_user, shape_of

_TAILS = {aten.relu.default, aten.leaky_relu.default, aten.gelu.default, aten.silu.default, aten.sigmoid.default}
_TAILS |= {aten.tanh.default, aten.avg_pool2d.default}
_MOST_CHANNELS = 16  # of an input: with more, each convolution alone fills the machine and the split costs a copy


def apply(program: Program) -> int:
    """Rewrite; how often it fired."""
    alike: dict[tuple, list[Call]] = defaultdict(list)
    for layer in program.calls(*CONVOLUTIONS):
        bias = argument(layer, 2, "bias")
        weight = shape_of(layer.args[1])
        batched = len(shape_of(layer)) == CONVOLUTIONS[layer.target] + 2
        known = program.is_constant(layer.args[1]) and (bias is None or program.is_constant(bias))
        if not known or not batched:
            continue
        settings = [argument(layer, i, n, d) for i, n, d in _SETTINGS]
        if settings.pop() == 1 and weight[1] <= _MOST_CHANNELS:
            key = (layer.args[0], layer.target, tuple(weight[1:]), dtype_of(layer.args[1]), repr(settings))
            alike[key].append(layer)
    groups = [layers for layers in alike.values() if len(layers) > 1]
    for layers in groups:
        _merge(program, layers)
    return len(groups)


_SETTINGS = ((3, "stride", [1]), (4, "padding", [0]), (5, "dilation", [1]), (6, "groups", 1))


def _merge(program: Program, layers: list[Call]) -> None:
    first = layers[0]
    weights = [w for layer in layers if (w := program.constant(layer.args[1])) is not None]
    biases = [program.constant(argument(layer, 2, "bias")) for layer in layers]
    widths = [len(w) for w in weights]
    dtype = dtype_of(first.args[1])
    bias = None
    if any(b is not None for b in biases):
        filled = [torch.zeros(n).double() if b is None else b for b, n in zip(biases, widths, strict=True)]
        bias = program.emit_constant(first, torch.cat(filled), dtype)
    weight = program.emit_constant(first, torch.cat(weights), dtype)
    whole = program.emit(first, first.target, first.args[0], weight, bias, *first.args[3:])
    ends = layers
    while (tails := _tails(ends)) is not None:
        rest = tails[0].args[1:]
        whole = program.emit(first, tails[0].target, whole, *rest, **tails[0].kwargs)
        ends = tails
    starts = [sum(widths[:index]) for index in range(len(widths))]
    parts = [program.emit(first, aten.narrow.default, whole, 1, s, w) for s, w in zip(starts, widths, strict=True)]
    program.replace_all(zip(ends, parts, strict=True))


def _tails(ends: list[Call]) -> list[Call] | None:
    """The next step after each branch, where it is the same one for all and sees the branch alone."""
    users = [only_user(end) for end in ends]
    if any(user is None or user.target not in _TAILS for user in users):
        return None
    tails = [user for user in users if user is not None]
    same = all((t.target, t.args[1:], t.kwargs) == (tails[0].target, tails[0].args[1:], tails[0].kwargs) for t in tails)
    return tails if same and all(t.args[0] is e for t, e in zip(tails, ends, strict=True)) else None
