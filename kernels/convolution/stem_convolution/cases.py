"""Inputs of stem_convolution that tests, benchmarks and plan checks share; and how far a result may be off."""

from typing import Any

import torch
from torch.nn import functional as F

from planmill.kernels.common.inputs import normal, strided
from planmill.kernels.common.spec import Case
from planmill.kernels.convolution.stem_convolution.packing import pack_kernel, unpack_kernel

FLOAT32 = (torch.float32,)
FULL_RANGE = (torch.float32, torch.bfloat16)
NONE = ("none", 1, 1, 0, True)


def drawn(
    dtype: torch.dtype, g: torch.Generator, shape: tuple[int, int, int, int], outputs: int, size: tuple[int, int],
    stride: int = 1, padding: int = 0, activation: str = "none", pooling: tuple[str, int, int, int, bool] = NONE,
    **options: Any,
) -> tuple:  # fmt: skip
    """Arguments for x of `shape`, [B, C, H, W], under a weight that keeps its size."""
    weight = normal(g, torch.float32, outputs, shape[1], *size, scale=1 / (shape[1] * size[0] * size[1]) ** 0.5)
    shift = normal(g, torch.float32, outputs, scale=options.get("scale", 1.0))
    return normal(g, dtype, *shape, **options), pack_kernel(weight), shift, stride, padding, activation, *pooling


def _strided(dtype: torch.dtype, g: torch.Generator) -> tuple:
    x, packed, bias, *rest = drawn(dtype, g, (2, 3, 9, 11), 21, (4, 4), 1, 3, "relu", ("average", 2, 2, 1, True))
    last = strided(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return last, strided(packed), bias.repeat_interleave(2)[::2], *rest


def _special(dtype: torch.dtype, g: torch.Generator) -> tuple:
    """NaN and both infinities in one image, seen by some outputs."""
    x, *rest = drawn(dtype, g, (2, 2, 14, 15), 18, (3, 3), 1, 1, "relu", ("max", 3, 2, 1, True))
    x[1, 0, 0, 2], x[1, 1, 12, 13], x[1, 0, 6, 6], x[1, 0, 7, 6] = torch.nan, torch.inf, torch.inf, -torch.inf
    return x, *rest


def cases() -> list[Case]:
    def case(id: str, *args: Any, dtypes: Any = None, gradient: bool = False, compiled: bool = False, **options: Any):
        kinds = {} if dtypes is None else {"dtypes": dtypes}
        return Case(
            id, lambda dtype, g: drawn(dtype, g, *args, **options), gradient=gradient, compiled=compiled, **kinds
        )

    average, largest = ("average", 2, 2, 1, True), ("max", 3, 2, 1, True)
    return [  # [B, C, H, W], K, (r, s), stride, padding, activation, pooling
        case("small", (2, 3, 7, 8), 5, (3, 3), 1, 1, "relu", average, compiled=True, gradient=True, dtypes=FULL_RANGE),
        case("one", (1, 1, 1, 1), 1, (1, 1)),
        case("efficient_ad", (1, 3, 21, 30), 40, (4, 4), 1, 3, "relu", average),
        case("resnet", (2, 3, 33, 29), 17, (7, 7), 2, 3, "relu", largest, gradient=True),
        case("encoder", (2, 3, 18, 40), 32, (4, 4), 2, 1, "relu"),
        case("bare", (2, 2, 9, 26), 33, (2, 5), gradient=True),
        case("average_inside", (1, 3, 14, 17), 16, (3, 2), 1, 2, "none", ("average", 3, 2, 1, False), gradient=True),
        case("gaps", (1, 2, 22, 25), 7, (3, 3), 1, 0, "none", ("max", 2, 3, 1, True)),
        case("large_steps", (1, 4, 23, 31), 20, (2, 2), 3, 0, "relu", ("average", 4, 1, 2, True)),
        case("wide_padding", (1, 1, 2, 3), 3, (4, 3), 1, 5, "relu", largest),
        case("channels", (1, 19, 8, 9), 50, (3, 3), 1, 1),
        case("past_a_block", (3, 1, 40, 14), 3, (3, 3), 1, 1, "relu", ("max", 3, 1, 1, True)),
        case("huge", (1, 3, 9, 9), 4, (3, 3), 1, 1, "relu", average, scale=1e8, dtypes=FULL_RANGE),
        case("tiny", (1, 3, 9, 9), 4, (3, 3), 1, 1, "relu", average, scale=1e-8, dtypes=FULL_RANGE),
        case("large_mean", (1, 3, 20, 20), 5, (4, 4), 1, 2, "relu", largest, mean=1000.0, dtypes=FULL_RANGE),
        case("no_batch", (0, 3, 6, 6), 4, (3, 3), 1, 0, "relu", average),
        Case("strided", _strided),
        Case("special", _special, FLOAT32),
    ]


def compare(args: tuple, got: tuple, want: tuple, atol: float, rtol: float) -> None:
    """Raise unless |got - y| <= atol * pool(|W| * |x| + |b|) + rtol |y|, or both are the same NaN or infinity.

    The bound is that of any order of the sum; it is pooled by its maximum.
    """
    x, packed, bias, stride, padding, _, _, *window, _ = args
    weight, size = unpack_kernel(packed.double(), bias.shape[0]).abs(), x.double().abs()
    spread = F.conv2d(torch.where(x.isfinite(), size, 0), weight, bias.double().abs(), stride, padding)
    bound = atol * F.max_pool2d(spread, *window).permute(0, 2, 3, 1)
    found, right = got[0].double(), want[0].double()
    off = (found - right).abs()
    same = (found == right) | (found.isnan() & right.isnan())
    wrong = ~(same | (off <= bound + rtol * right.abs()) & right.isfinite())
    if wrong.any():
        worst = off.nan_to_num(torch.inf).masked_fill(~wrong, -1).flatten().argmax()
        raise AssertionError(
            f"{int(wrong.sum())} of {wrong.numel()} are off, the worst by {off.flatten()[worst]:.3g} of "
            f"{bound.flatten()[worst]:.3g}: {found.flatten()[worst]:.6g} where {right.flatten()[worst]:.6g} is right"
        )
