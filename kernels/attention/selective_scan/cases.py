"""Inputs of selective_scan that tests, benchmarks and plan checks share."""

from collections.abc import Callable
from typing import Any

import torch

from planmill.kernels.common.inputs import normal, strided
from planmill.kernels.common.spec import Case

FLOAT32 = (torch.float32,)
FULL_RANGE = (torch.float32, torch.bfloat16)


def drawn(
    dtype: torch.dtype, g: torch.Generator, batch: int, channels: int, states: int, length: int, groups: int = 1, *,
    skip: bool = True, gated: bool = True, biased: bool = True, softplus: bool = True, rate: float = -16.0,
    scale: float = 1.0,
) -> tuple:  # fmt: skip
    """Arguments as trained models have them: rates below zero, and time steps after softplus around a tenth."""
    full, none = (batch, channels, length), torch.empty(0)
    u, delta = normal(g, dtype, *full, scale=scale), normal(g, dtype, *full, scale=scale)
    delta = delta if softplus else delta.abs() * 0.1
    A = torch.rand(channels, states, generator=g) * rate
    B, C = (normal(g, dtype, batch, groups, states, length) for _ in range(2))
    D = normal(g, torch.float32, channels) if skip else none
    z = normal(g, dtype, *full) if gated else none.to(dtype)
    bias = normal(g, torch.float32, channels, mean=-2.0) if biased else none
    return u, delta, A, B, C, D, z, bias, softplus


def _mixer(dtype: torch.dtype, g: torch.Generator) -> tuple:
    """As Mamba's block calls it: most tensors are transposes of rows of tokens."""
    u, delta, A, B, C, D, z, bias, softplus = drawn(dtype, g, 2, 24, 16, 21)
    delta, z, B, C = (x.mT.contiguous().mT for x in (delta, z, B, C))
    return u, delta, A, B, C, D, z, bias, softplus


def _strided(dtype: torch.dtype, g: torch.Generator) -> tuple:
    u, delta, A, B, C, D, z, bias, softplus = drawn(dtype, g, 2, 6, 5, 9, 2)
    return strided(u), strided(delta), strided(A), strided(B), strided(C), D, strided(z), bias, softplus


def _poisoned(which: int, value: float) -> Callable[..., tuple]:
    def make(dtype: torch.dtype, g: torch.Generator) -> tuple:
        args = drawn(dtype, g, 2, 5, 4, 13)
        args[which][(1,) * (args[which].dim() - 1) if which < 2 else (1, 0, 2)][6] = value
        return args

    return make


def cases() -> list[Case]:
    def case(id: str, *sizes: int, dtypes: Any = None, gradient: bool = False, compiled: bool = False, **options: Any):
        kinds = {} if dtypes is None else {"dtypes": dtypes}
        return Case(id, lambda t, g: drawn(t, g, *sizes, **options), gradient=gradient, compiled=compiled, **kinds)

    return [  # batch, channels, states, length, groups
        case("small", 2, 3, 2, 3, gradient=True, compiled=True, dtypes=FLOAT32),
        case("one", 1, 1, 1, 1),
        case("odd", 2, 19, 7, 33),
        case("groups", 2, 12, 5, 18, 3, gradient=True, dtypes=FULL_RANGE),
        case("past_a_tile", 1, 33, 16, 70, dtypes=FULL_RANGE),
        case("bare", 2, 6, 4, 11, skip=False, gated=False, biased=False, softplus=False, dtypes=FLOAT32),
        case("no_gate", 2, 5, 3, 9, gated=False, dtypes=FLOAT32),
        case("empty_batch", 0, 5, 3, 9, dtypes=FLOAT32),
        case("no_positions", 2, 5, 3, 0, dtypes=FLOAT32),
        case("growing", 1, 5, 3, 12, rate=0.3, dtypes=FLOAT32),
        case("fast_decay", 2, 9, 4, 17, rate=-1e4, dtypes=FULL_RANGE),
        case("tiny", 2, 9, 4, 17, scale=1e-6, dtypes=FULL_RANGE),
        case("large_steps", 2, 9, 4, 17, scale=30.0, dtypes=FLOAT32),
        Case("mixer", _mixer),
        Case("strided", _strided, dtypes=FULL_RANGE),
        Case("nan", _poisoned(0, torch.nan), dtypes=FULL_RANGE),
        Case("nan_step", _poisoned(1, torch.nan), dtypes=FLOAT32),
        Case("nan_input_map", _poisoned(3, torch.nan), dtypes=FLOAT32),
    ]
