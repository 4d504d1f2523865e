"""Inputs of cluster_attention that tests, benchmarks and plan checks share."""

from collections.abc import Callable
from typing import Any

import torch

from planmill.kernels.common.inputs import normal, strided
from planmill.kernels.common.spec import Case

FLOAT32 = (torch.float32,)
FULL_RANGE = (torch.float32, torch.bfloat16)


def any_members(g: torch.Generator, batch: int, heads: int, tokens: int, clusters: int, window: int) -> torch.Tensor:
    """Distinct random tokens in each cluster, ascending: some tokens are in several, some in none."""
    order = torch.rand(batch, heads, clusters, tokens, generator=g).argsort(-1)[..., :window]
    return order.sort(-1).values.int()


def drawn(
    dtype: torch.dtype, g: torch.Generator, batch: int, heads: int, tokens: int, width: int, clusters: int, window: int,
    *, k_tokens: int | None = None, k_window: int | None = None, value_width: int | None = None, memory: int = 0,
    masked: bool = False, causal: bool = False, shared_qk: bool = False, scale: float = 1.0, mean: float = 0.0,
) -> tuple:  # fmt: skip
    """Arguments of the op; `scale` and `mean` are those of the queries' values."""
    k_tokens = tokens if k_tokens is None else k_tokens
    value_width = width if value_width is None else value_width
    q = normal(g, dtype, batch, heads, tokens, width, scale=scale, mean=mean)
    k = q if shared_qk else normal(g, dtype, batch, heads, k_tokens, width)
    v = normal(g, dtype, batch, heads, k_tokens, value_width)
    q_members = any_members(g, batch, heads, tokens, clusters, window)
    k_members = q_members
    if not shared_qk:
        k_members = any_members(g, batch, heads, k_tokens, clusters, window if k_window is None else k_window)
    memories = (normal(g, dtype, heads, clusters, memory, w).float() for w in (width, value_width))
    masks = (torch.rand(batch, n, generator=g) < 0.7 if masked else torch.empty(0, dtype=torch.bool)
             for n in (tokens, k_tokens))  # fmt: skip
    return q, k, v, q_members, k_members, *memories, *masks, width**-0.5, causal, shared_qk


def _strided(dtype: torch.dtype, g: torch.Generator) -> tuple:
    q, k, v, *rest = drawn(dtype, g, 2, 3, 21, 10, 4, 7, memory=2, masked=True)
    rest[0], rest[1] = (members.mT.contiguous().mT for members in rest[:2])
    rest[2], rest[3] = strided(rest[2]), strided(rest[3])
    return strided(q), strided(k), strided(v), *rest


def _heads_inside(dtype: torch.dtype, g: torch.Generator) -> tuple:
    q, k, v, *rest = drawn(dtype, g, 2, 3, 33, 16, 5, 7)
    return *(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)), *rest


def _changed(change: Callable[[tuple], object], *sizes: int, **options: Any) -> Callable[..., tuple]:
    def make(dtype: torch.dtype, g: torch.Generator) -> tuple:
        args = drawn(dtype, g, *sizes, **options)
        change(args)
        return args

    return make


def _unordered(args: tuple) -> None:
    args[3].copy_(args[3].flip(-1))
    if args[4] is not args[3]:
        args[4].copy_(args[4].roll(2, -1))


def _nan_key(args: tuple) -> None:
    args[1][0, 0, 5], args[1][0, 1, 2, 0] = torch.nan, torch.nan


def _nan_query(args: tuple) -> None:
    args[0][0, 0, 5], args[0][0, 1, 2, 0] = torch.nan, torch.nan


def _nan_keys(args: tuple) -> None:
    args[1].fill_(torch.nan)


def _infinite(args: tuple) -> None:
    args[1][0, 0, 5, 0], args[1][0, 0, 6, 1], args[0][0, 1, 2, 0] = torch.inf, -torch.inf, torch.inf


def _all_masked(args: tuple) -> None:
    args[7][0], args[8][0] = False, False


def cases() -> list[Case]:
    def case(id: str, *sizes: int, dtypes: Any = None, gradient: bool = False, compiled: bool = False, **options: Any):
        def make(dtype: torch.dtype, g: torch.Generator) -> tuple:
            return drawn(dtype, g, *sizes, **options)

        return Case(id, make, gradient=gradient, compiled=compiled, **({} if dtypes is None else {"dtypes": dtypes}))

    small = (2, 2, 17, 6, 3, 7)
    made = [  # batch, heads, tokens, width, clusters, window
        case("small", 2, 2, 9, 6, 3, 4, compiled=True, gradient=True, dtypes=FLOAT32, memory=1, masked=True),
        case("odd", 2, 3, 37, 11, 5, 7),
        case("shared", 2, 3, 37, 11, 5, 7, shared_qk=True, gradient=True),
        case("shared_causal", 1, 2, 40, 8, 3, 29, shared_qk=True, causal=True),
        case("causal", 1, 2, 40, 8, 3, 29, causal=True, gradient=True),
        case("causal_memory", 1, 2, 40, 8, 3, 9, causal=True, memory=2),
        case("masked", 2, 2, 37, 11, 5, 7, masked=True, causal=True),
        case("shared_masked", 2, 2, 37, 11, 5, 7, masked=True, shared_qk=True, causal=True),
        case("shared_memory", 2, 2, 37, 11, 5, 7, shared_qk=True, memory=3),
        case("cross", 2, 2, 19, 8, 3, 5, k_tokens=33, k_window=12, value_width=20, memory=1, masked=True),
        case("one", 1, 1, 1, 1, 1, 1),
        case("one_shared", 1, 1, 1, 1, 1, 1, shared_qk=True),
        case("one_member", 1, 2, 20, 7, 9, 1, shared_qk=True),
        case("past_a_tile", 1, 1, 150, 64, 2, 101),
        case("past_a_tile_causal", 1, 1, 150, 66, 2, 101, causal=True, shared_qk=True),
        case("huge", *small, scale=1e4),
        case("largest", *small, scale=1e37, dtypes=FULL_RANGE),
        case("large_mean", *small, mean=30.0, shared_qk=True),
        case("tiny", *small, scale=1e-15, shared_qk=True, dtypes=FULL_RANGE),
        case("memory_alone", 1, 2, 9, 6, 3, 4, k_tokens=0, k_window=0, memory=2),
        case("no_keys", 1, 2, 9, 6, 3, 4, k_tokens=0, k_window=0),
        case("no_batch", 0, 2, 9, 6, 3, 4),
        case("no_tokens", 2, 2, 0, 6, 3, 0),
        case("no_clusters", 2, 2, 9, 6, 0, 4),
        Case("strided", _strided),
        Case("heads_inside", _heads_inside),
        Case("unordered", _changed(_unordered, *small, causal=True, masked=True), FLOAT32),
        Case("unordered_shared", _changed(_unordered, *small, causal=True, shared_qk=True), FLOAT32),
        Case("all_masked", _changed(_all_masked, *small, masked=True), FLOAT32),
        Case("all_masked_shared", _changed(_all_masked, *small, masked=True, shared_qk=True, causal=True), FLOAT32),
    ]
    for change in (_nan_key, _nan_query, _nan_keys, _infinite):
        made += [
            Case(change.__name__[1:], _changed(change, *small), FLOAT32),
            Case(f"{change.__name__[1:]}_shared", _changed(change, *small, causal=True, shared_qk=True), FLOAT32),
        ]
    return made
