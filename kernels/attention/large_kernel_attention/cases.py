"""Inputs of large_kernel_attention that tests, benchmarks and plan checks share; and how far a result may be off."""

from typing import Any

import torch

from planmill.kernels.attention.large_kernel_attention.reference import large_kernel_attention_reference
from planmill.kernels.common.inputs import normal, strided
from planmill.kernels.common.spec import Case

FLOAT32 = (torch.float32,)
FULL_RANGE = (torch.float32, torch.bfloat16)


def weights(dtype: torch.dtype, g: torch.Generator, channels: int) -> tuple[torch.Tensor, ...]:
    """Weights under which every convolution keeps the size of its input; biases beside them."""
    return (
        normal(g, dtype, channels, 1, 5, 5, scale=0.2),
        normal(g, dtype, channels),
        normal(g, dtype, channels, 1, 7, 7, scale=1 / 7),
        normal(g, dtype, channels),
        normal(g, dtype, channels, channels, 1, 1, scale=max(channels, 1) ** -0.5),
        normal(g, dtype, channels),
    )


def drawn(dtype: torch.dtype, g: torch.Generator, *shape: int, **options: Any) -> tuple:
    """Arguments for x of `shape`."""
    return normal(g, dtype, *shape, **options), *weights(dtype, g, shape[1])


def _channels_last(dtype: torch.dtype, g: torch.Generator) -> tuple:
    x, *rest = drawn(dtype, g, 2, 3, 9, 11)
    return x.contiguous(memory_format=torch.channels_last), *rest


def _strided(dtype: torch.dtype, g: torch.Generator) -> tuple:
    x, *rest = drawn(dtype, g, 2, 3, 9, 11)
    return strided(x), *(strided(w) if w.dim() > 1 else w for w in rest)


def _nan(dtype: torch.dtype, g: torch.Generator) -> tuple:
    """In one corner of one image: what is out of its reach stays."""
    x, *rest = drawn(dtype, g, 2, 3, 27, 30)
    x[1, 2, 0, 0], x[1, 0, 26, 29] = torch.nan, torch.inf
    return x, *rest


def cases() -> list[Case]:
    def case(id: str, *shape: int, dtypes: Any = None, gradient: bool = False, compiled: bool = False, **options: Any):
        kinds = {} if dtypes is None else {"dtypes": dtypes}
        return Case(
            id, lambda dtype, g: drawn(dtype, g, *shape, **options), gradient=gradient, compiled=compiled, **kinds
        )

    return [  # B, C, H, W
        case("small", 2, 3, 5, 6, compiled=True, gradient=True, dtypes=FULL_RANGE),
        case("one", 1, 1, 1, 1),
        case("one_row", 1, 2, 1, 19),
        case("one_column", 1, 2, 19, 1),
        case("below_the_kernel", 2, 3, 7, 7, gradient=True),
        case("as_the_kernel", 1, 2, 23, 23),
        case("odd", 2, 3, 13, 29, gradient=True),
        case("past_vectors", 1, 2, 25, 33),
        case("stage", 1, 4, 28, 28),
        case("past_a_block", 1, 33, 8, 9),
        case("wide", 1, 1, 4, 130),
        case("huge", 1, 2, 9, 9, scale=1e8, dtypes=FULL_RANGE),
        case("tiny", 1, 2, 9, 9, scale=1e-8, dtypes=FULL_RANGE),
        case("large_mean", 1, 2, 20, 20, mean=1000.0, dtypes=FULL_RANGE),
        case("no_batch", 0, 3, 5, 5),
        case("no_rows", 2, 3, 0, 5),
        case("no_channels", 2, 0, 5, 5),
        Case("channels_last", _channels_last),
        Case("strided", _strided),
        Case("nan", _nan, FLOAT32),
    ]


def compare(args: tuple, got: tuple, want: tuple, atol: float, rtol: float) -> None:
    """Raise unless |got - y| <= atol * (the same sums of absolute values) + rtol |y|: sums may cancel."""
    spread = large_kernel_attention_reference(*(a.double().abs() for a in args))
    found, right = got[0].double(), want[0].double()
    off, bound = (found - right).abs(), atol * spread + rtol * right.abs()
    wrong = ~((off <= bound) | (~found.isfinite() & ~right.isfinite()) | (found == right))
    if wrong.any():
        worst = (off / bound).nan_to_num(torch.inf).masked_fill(~wrong, 0).flatten().argmax()
        raise AssertionError(
            f"{int(wrong.sum())} of {wrong.numel()} are off, the worst by {off.flatten()[worst]:.3g} of "
            f"{bound.flatten()[worst]:.3g}: {found.flatten()[worst]:.6g} where {right.flatten()[worst]:.6g} is right"
        )
