"""Inputs of prototype_attention that tests, benchmarks and plan checks share."""

from typing import Any

import torch

from planmill.kernels.common.inputs import normal, poison_row, strided
from planmill.kernels.common.spec import Case


def drawn(
    dtype: torch.dtype, g: torch.Generator, batch: int, tokens: int, heads: int, d: int, prototypes: int, columns: int,
    *, scale: float = 1.0,
) -> tuple:  # fmt: skip
    """Random projections, keys, folded values, tau of both signs and bias."""
    q = normal(g, dtype, batch, tokens, heads, d, scale=scale)
    keys = normal(g, dtype, batch, heads, prototypes, d, scale=scale)
    table = normal(g, dtype, batch, heads * prototypes, columns)
    return q, keys, table, normal(g, dtype, heads, mean=1.0), normal(g, dtype, columns)


def _strided(dtype: torch.dtype, g: torch.Generator) -> tuple:
    q, keys, table, tau, bias = drawn(dtype, g, 2, 29, 3, 10, 5, 12)
    return strided(q), strided(keys), strided(table), tau, bias


def _negative(dtype: torch.dtype, g: torch.Generator) -> tuple:
    """Keys on one side of all queries: every weight is 0, and the bias is left."""
    q, keys, *rest = drawn(dtype, g, 2, 29, 3, 10, 5, 12)
    rest[1] = rest[1].abs()
    return q.abs(), -keys.abs(), *rest


def _zeros(dtype: torch.dtype, g: torch.Generator) -> tuple:
    q, keys, *rest = drawn(dtype, g, 2, 29, 3, 10, 5, 12)
    q[0, 3, 1] = 0
    keys[1, 2, 4] = 0
    return q, keys, *rest


def _nan(dtype: torch.dtype, g: torch.Generator) -> tuple:
    q, *rest = drawn(dtype, g, 2, 29, 3, 10, 5, 12)
    return poison_row(q, 8), *rest


def cases() -> list[Case]:
    def case(id: str, *sizes: int, dtypes: Any = None, gradient: bool = False, compiled: bool = False, **options: Any):
        def make(dtype: torch.dtype, g: torch.Generator) -> tuple:
            batch, tokens, heads, d, prototypes, columns = sizes
            return drawn(dtype, g, batch, tokens, heads, d, prototypes, columns, **options)

        kinds = {} if dtypes is None else {"dtypes": dtypes}
        return Case(id, make, gradient=gradient, compiled=compiled, **kinds)

    f32 = (torch.float32,)
    return [  # batch, tokens, heads, d, prototypes, columns
        case("small", 2, 5, 2, 6, 3, 7, compiled=True, gradient=True, dtypes=(torch.float32, torch.bfloat16)),
        case("one", 1, 1, 1, 1, 1, 1),
        case("odd", 3, 11, 3, 9, 6, 13, gradient=True),
        case("past_a_tile", 2, 25, 2, 17, 17, 65),
        case("many", 1, 70, 4, 32, 6, 130),
        case("many_prototypes", 1, 20, 1, 8, 80, 9),
        case("tiny", 2, 26, 3, 10, 5, 12, scale=1e-11, dtypes=f32),
        case("huge", 2, 26, 3, 10, 5, 12, scale=1e15, dtypes=f32),
        case("no_batch", 0, 5, 2, 6, 3, 7),
        case("no_tokens", 2, 0, 2, 6, 3, 7),
        case("no_prototypes", 2, 5, 2, 6, 0, 7),
        Case("strided", _strided),
        Case("negative", _negative),
        Case("zeros", _zeros),
        Case("nan", _nan),
    ]
