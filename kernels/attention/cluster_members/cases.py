"""Inputs of cluster_members that tests, benchmarks and plan checks share."""

from collections.abc import Callable
from typing import Any

import torch

from planmill.kernels.common.inputs import integers, normal, poison_row, strided
from planmill.kernels.common.spec import Case

FLOAT32 = (torch.float32,)
FULL_RANGE = (torch.float32, torch.bfloat16)


def drawn(
    dtype: torch.dtype, g: torch.Generator, batch: int, heads: int, tokens: int, width: int, clusters: int, window: int,
    *, make: Callable[..., torch.Tensor] = normal, **options: float,
) -> tuple:  # fmt: skip
    """Arguments with tokens made by `make`, and unit centroids."""
    x = make(g, dtype, batch, heads, tokens, width, **options)
    centroids = torch.nn.functional.normalize(torch.randn(heads, clusters, width, generator=g), dim=-1)
    return x, centroids, window


def _strided(dtype: torch.dtype, g: torch.Generator) -> tuple:
    x, centroids, window = drawn(dtype, g, 2, 3, 33, 10, 5, 7)
    return strided(x), strided(centroids), window


def _heads_inside(dtype: torch.dtype, g: torch.Generator) -> tuple:
    x, centroids, window = drawn(dtype, g, 2, 3, 33, 16, 5, 7)
    return x.transpose(1, 2).contiguous().transpose(1, 2), centroids, window


def _not_numbers(dtype: torch.dtype, g: torch.Generator) -> tuple:
    x, centroids, window = drawn(dtype, g, 2, 2, 20, 9, 3, 18)
    for row in (0, 5, 31, 32, 33):
        x = poison_row(x, row)
    x[1, 1, 3, 2], x[1, 1, 4] = torch.inf, torch.nan
    centroids[1, 2, 0] = torch.nan
    return x, centroids, window


def _all_nan(dtype: torch.dtype, g: torch.Generator) -> tuple:
    x, centroids, window = drawn(dtype, g, 1, 2, 12, 4, 2, 5)
    return torch.full_like(x, torch.nan), centroids, window


def cases() -> list[Case]:
    def case(id: str, *sizes: int, dtypes: tuple | None = None, compiled: bool = False, **options: object) -> Case:
        def make(dtype: torch.dtype, g: torch.Generator) -> tuple:
            batch, heads, tokens, width, clusters, window = sizes
            return drawn(dtype, g, batch, heads, tokens, width, clusters, window, **options)  # type: ignore[arg-type]

        kinds: dict[str, Any] = {} if dtypes is None else {"dtypes": dtypes}
        return Case(id, make, compiled=compiled, **kinds)

    return [  # batch, heads, tokens, width, clusters, window
        case("small", 2, 2, 9, 6, 3, 4, compiled=True, dtypes=FLOAT32),
        case("odd", 2, 3, 37, 11, 5, 7),
        case("one", 1, 1, 1, 1, 1, 1),
        case("one_token", 2, 1, 1, 5, 3, 1),
        case("one_member", 1, 2, 50, 7, 9, 1),
        case("all_tokens", 1, 2, 6, 8, 2, 6),
        case("past_a_tile", 1, 1, 1030, 64, 17, 64),
        case("wide", 1, 1, 65, 130, 65, 9),
        case("ties", 2, 2, 60, 3, 4, 13, make=integers),
        case("constant", 1, 2, 40, 5, 3, 11, make=integers, high=1),
        case("huge", 1, 2, 40, 9, 3, 11, scale=1e25, dtypes=FULL_RANGE),
        case("tiny", 1, 2, 40, 9, 3, 11, scale=1e-13, dtypes=FULL_RANGE),
        case("large_mean", 1, 2, 40, 9, 3, 11, mean=30.0),
        case("no_batch", 0, 2, 9, 6, 3, 4),
        case("no_tokens", 2, 2, 0, 6, 3, 0),
        case("no_clusters", 2, 2, 9, 6, 0, 4),
        Case("strided", _strided),
        Case("heads_inside", _heads_inside),
        Case("not_numbers", _not_numbers),
        Case("all_nan", _all_nan, FLOAT32),
    ]
