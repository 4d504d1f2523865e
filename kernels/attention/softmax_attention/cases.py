"""Inputs of softmax_attention that tests, benchmarks and plan checks share."""

from typing import Any

import torch

from planmill.kernels.common.inputs import integers, normal, strided
from planmill.kernels.common.spec import Case

FLOAT32 = (torch.float32,)
Drawn = tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]


def drawn(
    dtype: torch.dtype, g: torch.Generator, batch: int, heads: int, queries: int, keys: int, d: int, dv: int,
    **options: Any,
) -> Drawn:  # fmt: skip
    """Queries, keys and values of these sizes, and the usual scale."""
    sizes = ((queries, d), (keys, d), (keys, dv))
    q, k, v = (normal(g, dtype, batch, heads, *size, **options) for size in sizes)
    return q, k, v, max(d, 1) ** -0.5


def projected(dtype: torch.dtype, g: torch.Generator, batch: int, heads: int, tokens: int, d: int) -> Drawn:
    """Views of what one linear layer gives for all three, [B, N, 3 H D]."""
    qkv = normal(g, dtype, batch, tokens, 3 * heads * d).unflatten(2, (3, heads, d))
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v, d**-0.5


def _strided(dtype: torch.dtype, g: torch.Generator) -> Drawn:
    q, k, v, scale = drawn(dtype, g, 2, 3, 14, 21, 9, 18)
    return strided(q), strided(k), strided(v), scale


def _channels_first(dtype: torch.dtype, g: torch.Generator) -> Drawn:
    """Views of pictures: the positions of a channel stand together."""
    q, k, v = (normal(g, dtype, 2, 2, size, 275).mT for size in (9, 9, 20))
    return q, k, v, 9**-0.5


def _expanded(dtype: torch.dtype, g: torch.Generator) -> Drawn:
    """One head of keys and values for all heads of queries."""
    q, k, v, scale = drawn(dtype, g, 2, 3, 9, 20, 8, 8)
    return q, k[:, :1].expand_as(k), v[:, :1].expand_as(v), scale


def _ties(dtype: torch.dtype, g: torch.Generator) -> Drawn:
    q, k, v = (integers(g, dtype, 1, 2, 30, 8) for _ in range(3))
    return q, k, v, 1.0


def _special(dtype: torch.dtype, g: torch.Generator) -> Drawn:
    """Queries with a NaN or an infinity; keys of one head at minus infinity, some of them or all."""
    q, k, v, scale = drawn(dtype, g, 1, 4, 13, 300, 5, 6)
    q[0, 0, 3, 1], q[0, 0, 7, 2] = torch.nan, torch.inf
    q[0, 1:, :, 0] = q[0, 1:, :, 0].abs() + 0.1
    k[0, 1, :200, 0] = -torch.inf
    k[0, 2, 290:, 0] = -torch.inf
    k[0, 3, :, 0] = -torch.inf
    return q, k, v, scale


def cases() -> list[Case]:
    def case(id: str, *args: Any, gradient: bool = False, compiled: bool = False, **options: Any) -> Case:
        return Case(id, lambda dtype, g: drawn(dtype, g, *args, **options), FLOAT32, gradient, compiled)

    return [  # batch, heads, queries, keys, channels of queries and keys, of values
        case("small", 2, 3, 5, 6, 7, 8, gradient=True, compiled=True),
        case("one", 1, 1, 1, 1, 1, 1),
        case("one_query", 2, 2, 1, 40, 16, 17),
        case("one_key", 2, 2, 5, 1, 16, 16),
        case("past_a_tile", 1, 2, 25, 33, 24, 33, gradient=True),
        case("past_a_block", 1, 1, 49, 257, 12, 20),
        case("past_a_task", 1, 2, 257, 35, 8, 8),
        case("blocks", 1, 2, 30, 1100, 32, 32),
        case("huge", 2, 1, 9, 300, 8, 8, scale=1e9),
        case("tiny", 2, 1, 9, 20, 8, 8, scale=1e-20),
        case("large_mean", 2, 1, 9, 20, 8, 8, mean=100.0),
        case("no_samples", 0, 2, 5, 5, 4, 4),
        case("no_queries", 2, 2, 0, 5, 4, 4),
        case("no_keys", 2, 2, 5, 0, 4, 4),
        case("no_channels", 2, 2, 5, 5, 0, 4),
        Case("projected", lambda dtype, g: projected(dtype, g, 2, 3, 65, 24), FLOAT32),
        Case("strided", _strided, FLOAT32),
        Case("channels_first", _channels_first, FLOAT32),
        Case("expanded", _expanded, FLOAT32),
        Case("ties", _ties, FLOAT32),
        Case("special", _special, FLOAT32),
    ]
