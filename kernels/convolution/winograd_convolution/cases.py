"""Inputs of winograd_convolution that tests, benchmarks and plan checks share; and how far a result may be off."""

from typing import Any

import torch
from torch.nn import functional as F

from planmill.kernels.common.inputs import normal, strided
from planmill.kernels.common.spec import Case
from planmill.kernels.convolution.winograd_convolution.transform import transform_weight

FLOAT32 = (torch.float32,)
FULL_RANGE = (torch.float32, torch.bfloat16)


def drawn(
    dtype: torch.dtype, g: torch.Generator, shape: tuple[int, int, int, int], outputs: int, size: int, padding: int = 0,
    **options: Any,
) -> tuple:  # fmt: skip
    """Arguments for x of `shape`, [B, H, W, C], under weights that keep its size."""
    weight = normal(g, torch.float32, outputs, shape[3], size, size, scale=1 / (size * max(shape[3], 1) ** 0.5))
    shift = normal(g, torch.float32, outputs, scale=options.get("scale", 1.0))
    return normal(g, dtype, *shape, **options), transform_weight(weight), shift, size, padding


def _strided(dtype: torch.dtype, g: torch.Generator) -> tuple:
    x, transformed, *rest = drawn(dtype, g, (2, 9, 11, 5), 6, 3, 1)
    return strided(x), strided(transformed), *rest


def _nan(dtype: torch.dtype, g: torch.Generator) -> tuple:
    """In one corner of one image: tiles that do not see it keep their values."""
    x, *rest = drawn(dtype, g, (2, 13, 14, 3), 4, 4)
    x[1, 0, 0, 2], x[1, 12, 13, 0] = torch.nan, torch.inf
    return x, *rest


def cases() -> list[Case]:
    def case(id: str, *args: Any, dtypes: Any = None, gradient: bool = False, compiled: bool = False, **options: Any):
        kinds = {} if dtypes is None else {"dtypes": dtypes}
        return Case(
            id, lambda dtype, g: drawn(dtype, g, *args, **options), gradient=gradient, compiled=compiled, **kinds
        )

    return [  # [B, H, W, C], K, r, padding
        case("small", (2, 6, 7, 3), 5, 3, 1, compiled=True, gradient=True, dtypes=FULL_RANGE),
        case("one", (1, 2, 2, 1), 1, 2),
        case("one_output", (1, 5, 5, 2), 3, 5),
        case("two", (2, 12, 9, 4), 9, 2, gradient=True),
        case("three", (2, 15, 10, 8), 16, 3, 1),
        case("four", (2, 13, 16, 9), 17, 4, gradient=True),
        case("five", (1, 11, 12, 8), 8, 5, 2),
        case("wide_padding", (1, 3, 2, 2), 3, 4, 5),
        case("past_a_block", (1, 49, 45, 3), 2, 4),
        case("past_a_group", (1, 8, 8, 3), 273, 3),
        case("channels", (1, 9, 9, 65), 33, 3, 1),
        case("huge", (1, 9, 9, 4), 4, 3, scale=1e8, dtypes=FULL_RANGE),
        case("tiny", (1, 9, 9, 4), 4, 4, scale=1e-8, dtypes=FULL_RANGE),
        case("large_mean", (1, 20, 20, 6), 5, 4, 2, mean=1000.0, dtypes=FULL_RANGE),
        case("no_batch", (0, 6, 6, 3), 4, 3),
        case("no_channels", (2, 6, 6, 0), 4, 3, 1),
        case("no_outputs", (2, 6, 6, 3), 0, 3, 1),
        Case("strided", _strided),
        Case("nan", _nan, FLOAT32),
    ]


def compare(args: tuple, got: tuple, want: tuple, atol: float, rtol: float) -> None:
    """Raise unless |got - y| <= atol * (largest input of the image's channels times its kernel) + rtol |y|.

    The transforms take differences: an output of a tile is as exact as the largest number of the tile allows. What sees
    a NaN or an infinity itself must not be finite; the others of its tile may or may not be.
    """
    x, transformed, bias, size, padding = args
    finite = torch.where(x.isfinite(), x, 0).double().abs()
    largest = finite.amax((1, 2), keepdim=True).expand_as(finite) if finite.numel() else finite
    taps = transformed.double().abs().sum(0)
    spread = torch.einsum("bxyc,pco->bxypo", largest[:, :1, :1], taps).flatten(3)[..., : len(bias)] + bias.abs()
    found, right = got[0].double(), want[0].double()
    off, bound = (found - right).abs(), atol * spread + rtol * right.abs()
    strange = (~x.isfinite()).any(3, keepdim=True).double().movedim(3, 1)
    seen = F.conv2d(strange, x.new_ones(1, 1, size, size, dtype=torch.float64), padding=padding).movedim(1, 3) > 0
    wrong = torch.where(seen, found.isfinite(), ~((off <= bound) | ~right.isfinite()))
    if wrong.any():
        worst = (off / bound).nan_to_num(torch.inf).masked_fill(~wrong, 0).flatten().argmax()
        raise AssertionError(
            f"{int(wrong.sum())} of {wrong.numel()} are off, the worst by {off.flatten()[worst]:.3g} of "
            f"{bound.flatten()[worst]:.3g}: {found.flatten()[worst]:.6g} where {right.flatten()[worst]:.6g} is right"
        )
