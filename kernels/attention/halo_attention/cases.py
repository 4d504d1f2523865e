"""Inputs of halo_attention that tests, benchmarks and plan checks share."""

from collections.abc import Callable
from typing import Any

import torch

from planmill.kernels.common.inputs import integers, normal
from planmill.kernels.common.spec import Case

FLOAT32 = (torch.float32,)
FULL_RANGE = (torch.float32, torch.bfloat16)


def drawn(
    dtype: torch.dtype, g: torch.Generator, batch: int, heads: int, d: int, dv: int, rows: int, columns: int,
    block: int, halo: int, stride: int = 1, *, masked: bool = False, scale_positions: bool = False,
    scale: float | None = None, make: Callable[..., torch.Tensor] = normal, **options: Any,
) -> tuple:  # fmt: skip
    """Arguments for images of `rows` x `columns` blocks."""
    height, width, win = rows * block, columns * block, block + 2 * halo
    q = make(g, dtype, batch, heads, d, height // stride, width // stride, **options)
    k = make(g, dtype, batch, heads, d, height, width, **options)
    v = make(g, dtype, batch, heads, dv, height, width, **options)
    rel_h, rel_w = (normal(g, dtype, 2 * win - 1, d, scale=d**-0.5) for _ in range(2))
    return q, k, v, rel_h, rel_w, block, halo, stride, d**-0.5 if scale is None else scale, masked, scale_positions


def _split(dtype: torch.dtype, g: torch.Generator, channels_last: bool) -> tuple:
    """k and v as the two parts of one convolution's output."""
    q, k, v, *rest = drawn(dtype, g, 2, 3, 5, 7, 2, 3, 4, 1)
    both = torch.cat([k, v], 2).flatten(1, 2)
    flat = q.flatten(1, 2)
    if channels_last:
        both, flat = both.to(memory_format=torch.channels_last), flat.to(memory_format=torch.channels_last)
    k, v = both.unflatten(1, (3, 12)).split([5, 7], 2)
    return flat.unflatten(1, (3, 5)), k, v, *rest


def _strided(dtype: torch.dtype, g: torch.Generator) -> tuple:
    """No unit stride anywhere, gaps of NaN."""

    def spread(x: torch.Tensor) -> torch.Tensor:
        wide = x.new_full([2 * n for n in reversed(x.shape)], torch.nan)
        view = wide[tuple(slice(None, None, 2) for _ in x.shape)].permute(*reversed(range(x.dim())))
        view.copy_(x)
        return view

    return tuple(spread(a) if isinstance(a, torch.Tensor) else a for a in drawn(dtype, g, 2, 2, 3, 5, 2, 2, 4, 1, 2))


def _poisoned(which: int, value: float, masked: bool) -> Callable[..., tuple]:
    """One number of a query, key or value at the edge of the first block: some windows hold it, the last does not."""

    def make(dtype: torch.dtype, g: torch.Generator) -> tuple:
        args = drawn(dtype, g, 2, 2, 5, 3, 3, 3, 4, 1, masked=masked)
        args[which][1, 1, 2, 3, 3] = value
        return args

    return make


def cases() -> list[Case]:
    def case(id: str, *sizes: int, dtypes: Any = None, gradient: bool = False, compiled: bool = False, **options: Any):
        kinds = {} if dtypes is None else {"dtypes": dtypes}
        return Case(id, lambda t, g: drawn(t, g, *sizes, **options), gradient=gradient, compiled=compiled, **kinds)

    return [  # batch, heads, d, dv, rows, columns, block, halo, stride
        case("small", 2, 2, 3, 4, 2, 1, 2, 1, gradient=True, compiled=True, dtypes=FLOAT32),
        case("one", 1, 1, 1, 1, 1, 1, 1, 0, dtypes=FLOAT32),
        case("odd", 2, 3, 5, 7, 1, 2, 3, 2, gradient=True),
        case("odd_masked", 2, 3, 5, 7, 1, 2, 3, 2, masked=True, gradient=True, dtypes=FLOAT32),
        case("halonet26t", 1, 1, 32, 32, 2, 2, 8, 2),
        case("halo_3", 1, 1, 16, 16, 1, 2, 8, 3, masked=True, dtypes=FULL_RANGE),
        case("stride_2", 1, 2, 8, 16, 2, 2, 8, 2, 2, gradient=True, dtypes=FLOAT32),
        case("stride_2_masked", 2, 1, 6, 3, 2, 1, 4, 1, 2, masked=True, scale_positions=True, dtypes=FULL_RANGE),
        case("stride_of_a_block", 1, 2, 4, 3, 2, 3, 3, 1, 3, dtypes=FLOAT32),
        case("block_7", 1, 1, 11, 19, 2, 1, 7, 2, scale_positions=True, dtypes=FLOAT32),
        case("halo_wider_than_image", 2, 1, 4, 6, 1, 1, 2, 5, dtypes=FLOAT32),
        case("no_halo", 1, 2, 8, 9, 3, 2, 4, 0, dtypes=FLOAT32),
        case("wide_block", 1, 1, 9, 5, 1, 2, 12, 1, dtypes=FLOAT32),
        case("empty_batch", 0, 2, 3, 4, 2, 1, 2, 1, dtypes=FLOAT32),
        case("no_blocks", 2, 2, 3, 4, 0, 1, 2, 1, dtypes=FLOAT32),
        case("ties", 1, 2, 4, 5, 2, 2, 4, 1, make=integers, scale=1.0, dtypes=FLOAT32),
        case("huge", 1, 2, 8, 6, 2, 2, 4, 1, mean=0.0, dtypes=FULL_RANGE, scale=1000.0),
        case("tiny", 1, 2, 8, 6, 2, 2, 4, 1, make=lambda g, t, *s: normal(g, t, *s, scale=1e-20), dtypes=FULL_RANGE),
        Case("split", lambda t, g: _split(t, g, False)),
        Case("channels_last", lambda t, g: _split(t, g, True)),
        Case("strided", _strided, dtypes=FULL_RANGE),
        Case("nan_key", _poisoned(1, torch.nan, False), dtypes=FULL_RANGE),
        Case("nan_value", _poisoned(2, torch.nan, True), dtypes=FLOAT32),
        Case("infinite_key", _poisoned(1, torch.inf, True), dtypes=FLOAT32),
        Case("nan_query", _poisoned(0, torch.nan, False), dtypes=FLOAT32),
    ]
