"""Inputs of packed_linear that tests, benchmarks and plan checks share; and how far a result may be off."""

from typing import Any

import torch

from planmill.kernels.common.inputs import normal, strided
from planmill.kernels.common.spec import Case
from planmill.kernels.linear.packed_linear.packing import pack_weight

FLOAT32 = (torch.float32,)


def drawn(
    dtype: torch.dtype, g: torch.Generator, rows: int, channels: int, outputs: int, activation: str = "none",
    **options: Any,
) -> tuple:  # fmt: skip
    """Arguments for x [rows, channels] under a weight that keeps its size."""
    weight = normal(g, dtype, outputs, channels, scale=1 / max(channels, 1) ** 0.5)
    bias = normal(g, dtype, outputs, scale=options.get("scale", 1.0))
    return normal(g, dtype, rows, channels, **options), pack_weight(weight), bias, activation


def _strided(dtype: torch.dtype, g: torch.Generator) -> tuple:
    x, packed, bias, _ = drawn(dtype, g, 12, 7, 37)
    return strided(x.unflatten(0, (3, 4))), strided(packed), bias.repeat_interleave(2)[::2], "silu"


def _vector(dtype: torch.dtype, g: torch.Generator) -> tuple:
    x, *rest = drawn(dtype, g, 1, 12, 21, "gelu")
    return x[0], *rest


def _special(dtype: torch.dtype, g: torch.Generator) -> tuple:
    """A row with a NaN, one with an infinity, one with both signs of it: they touch no other."""
    x, *rest = drawn(dtype, g, 14, 5, 33, "relu")
    x[3, 1], x[7, 2], x[12, 0], x[12, 4] = torch.nan, torch.inf, torch.inf, -torch.inf
    return x, *rest


def cases() -> list[Case]:
    def case(id: str, *args: Any, gradient: bool = False, compiled: bool = False, **options: Any) -> Case:
        return Case(id, lambda dtype, g: drawn(dtype, g, *args, **options), FLOAT32, gradient, compiled)

    return [  # rows, channels, outputs
        case("small", 5, 6, 7, "gelu", gradient=True, compiled=True),
        case("one", 1, 1, 1),
        case("one_row", 1, 40, 150, "silu"),
        case("two_rows", 2, 17, 90, "relu"),
        case("past_a_tile", 13, 33, 17, "gelu_tanh", gradient=True),
        case("past_a_panel", 7, 9, 49),
        case("past_a_block", 241, 12, 33, "gelu"),
        case("deep", 8, 2049, 18, "gelu"),
        case("deep_row", 1, 2049, 18),
        case("wide", 25, 8, 400),
        case("huge", 9, 8, 20, "gelu", scale=1e15),
        case("tiny", 9, 8, 20, "gelu_tanh", scale=1e-20),
        case("large_mean", 20, 64, 20, mean=1000.0),
        case("no_rows", 0, 6, 4, "gelu"),
        case("no_channels", 3, 0, 20, "gelu"),
        case("no_outputs", 3, 4, 0),
        Case("strided", _strided, FLOAT32),
        Case("vector", _vector, FLOAT32),
        Case("special", _special, FLOAT32),
    ]


def compare(args: tuple, got: tuple, want: tuple, atol: float, rtol: float) -> None:
    """Raise unless |got - y| <= atol * (|x| |W|^T + |b|) + rtol |y|, or both are the same NaN or infinity.

    The bound is that of any order of the sum; activations do not spread it by more than 1.13.
    """
    x, packed, bias, _ = args
    weight = packed.double().transpose(1, 2).flatten(0, 1)[: bias.shape[0]]
    found, right = got[0].double(), want[0].double()
    bound = atol * (x.double().abs() @ weight.abs().T + bias.double().abs()) + rtol * right.abs()
    same = (found == right) | (found.isnan() & right.isnan())
    wrong = ~(same | ((found - right).abs() <= bound) & right.isfinite())
    if wrong.any():
        off = (found - right).abs()
        worst = off.nan_to_num(torch.inf).masked_fill(~wrong, -1).flatten().argmax()
        raise AssertionError(
            f"{int(wrong.sum())} of {wrong.numel()} are off, the worst by {off.flatten()[worst]:.3g} of "
            f"{bound.flatten()[worst]:.3g}: {found.flatten()[worst]:.6g} where {right.flatten()[worst]:.6g} is right"
        )
