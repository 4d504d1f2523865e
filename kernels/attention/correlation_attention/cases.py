"""Inputs of correlation_attention that tests, benchmarks and plan checks share."""

from collections.abc import Callable
from typing import Any

import torch

from planmill.kernels.common.inputs import integers, normal, strided
from planmill.kernels.common.spec import Case

FLOAT32 = (torch.float32,)
ALL = "qq+kk+vv"


def drawn(
    dtype: torch.dtype, g: torch.Generator, heads: tuple[int, int], tokens: int, d: int, maps: str = ALL,
    original: bool = True, *, dv: int | None = None, make: Callable[..., torch.Tensor] = normal, **options: Any,
) -> tuple:  # fmt: skip
    """Arguments with q, k and v made by `make`."""
    q, k, v = (make(g, dtype, *heads, tokens, width, **options) for width in (d, d, d if dv is None else dv))
    return q, k, v, maps, original, d**-0.5


def compare(args: tuple, got: tuple, want: tuple, atol: float, rtol: float) -> None:
    """Element-wise; weights are as good as float32 holds their score: e^S of a large S is off by the rounding of S."""
    lengths = [x.double().nan_to_num(0, 0, 0).square().sum(-1).amax() if x.numel() else 0.0 for x in args[:3]]
    rounding = 3e-7 * abs(args[5]) * float(max(lengths))
    largest = float(args[2].double().nan_to_num(0, 0, 0).abs().amax()) if args[2].numel() else 0.0
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=atol + rounding * largest, rtol=rtol + rounding, equal_nan=True)


def _strided(dtype: torch.dtype, g: torch.Generator) -> tuple:
    q, k, v, *rest = drawn(dtype, g, (2, 3), 19, 10)
    fused = torch.stack([q, k]).permute(1, 3, 0, 2, 4).contiguous()  # [B, N, 2, H, d], as a linear layer leaves it
    q, k = fused.permute(2, 0, 3, 1, 4).unbind()
    return q, k, strided(v), *rest


def _changed(change: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], object], maps: str) -> Callable[..., tuple]:
    def make(dtype: torch.dtype, g: torch.Generator) -> tuple:
        args = drawn(dtype, g, (2, 2), 70, 8, maps)
        change(*args[:3])
        return args

    return make


def _nan_query(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    q[0, 1, 3, 2] = torch.nan


def _nan_keys(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    k[0, 0, 65] = k[1, 1, 3, 0] = torch.nan
    k[1, 0] = torch.nan


def _nan_value(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    v[1, 0, 69, 5] = torch.nan


def _infinite(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    q[..., 0], k[..., 0] = 1.0, 0.0
    k[0, 0, 3, 0] = k[0, 0, 68, 0] = torch.inf
    k[1, 0, :, 0] = -torch.inf
    k[0, 1, 5, 0] = -torch.inf


def _peaked(dtype: torch.dtype, g: torch.Generator) -> tuple:
    """Each row's own score far above the others: almost one-hot weights, and some of length 0."""
    q, k, v, *rest = drawn(dtype, g, (1, 2), 67, 16)
    q = q * torch.logspace(-3, 1.3, 67)[:, None].to(dtype)
    k[0, 0, 5] = 0
    return q, k, v, *rest


def cases() -> list[Case]:
    def case(
        id: str, heads: tuple[int, int], tokens: int, d: int, maps: str = ALL, original: bool = True, *,
        dtypes: Any = None, gradient: bool = False, compiled: bool = False, **options: Any,
    ) -> Case:  # fmt: skip
        kinds = {} if dtypes is None else {"dtypes": dtypes}

        def make(dtype: torch.dtype, g: torch.Generator) -> tuple:
            return drawn(dtype, g, heads, tokens, d, maps, original, **options)

        return Case(id, make, gradient=gradient, compiled=compiled, **kinds)

    return [
        case("small", (2, 2), 5, 6, compiled=True, gradient=True, dtypes=(torch.float32, torch.bfloat16)),
        case("one", (1, 1), 1, 1),
        case("odd", (2, 3), 11, 9, gradient=True),
        case("past_a_panel", (1, 2), 65, 32),
        case("past_a_tile", (3, 1), 25, 16, "vv"),
        case("two_panels", (1, 1), 130, 40, "qq+kk"),
        case("qk", (2, 1), 33, 24, "qk", False, gradient=True),
        case("qq", (1, 2), 33, 8, "qq", False),
        case("kk", (1, 2), 64, 8, "kk"),
        case("joint", (1, 2), 49, 20, "qkv", dv=12, gradient=True),
        case("every_map", (1, 1), 70, 8, "qk+qq+kk+vv+qkv"),
        case("wide_values", (1, 2), 40, 8, "qq+kk", dv=150),
        case("wide", (1, 1), 30, 260, "qq+vv", dv=5),
        case("huge", (1, 2), 40, 16, scale=10.0, dtypes=FLOAT32),
        case("tiny", (1, 2), 40, 16, scale=1e-6, dtypes=FLOAT32),
        case("large_mean", (1, 2), 40, 16, mean=30.0, dtypes=FLOAT32),
        case("ties", (1, 2), 80, 4, make=integers),
        case("no_batch", (0, 2), 5, 4),
        case("no_heads", (2, 0), 5, 4),
        case("no_tokens", (2, 2), 0, 4),
        Case("strided", _strided),
        Case("peaked", _peaked, FLOAT32),
        Case("nan_query", _changed(_nan_query, ALL), FLOAT32),
        Case("nan_keys", _changed(_nan_keys, "qq+kk"), FLOAT32),
        Case("nan_value", _changed(_nan_value, "qq"), FLOAT32),
        Case("nan_value_vv", _changed(_nan_value, "vv"), FLOAT32),
        Case("infinite", _changed(_infinite, "qq+qk"), FLOAT32),
    ]
