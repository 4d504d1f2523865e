"""Inputs of linear_attention that tests, benchmarks and plan checks share."""

from collections.abc import Callable
from typing import Any

import torch

from planmill.kernels.common.inputs import integers, normal, strided
from planmill.kernels.common.spec import Case

FLOAT32 = (torch.float32,)
FULL_RANGE = (torch.float32, torch.bfloat16)
Options = tuple[str, bool, bool, float, float]

NORMAL: Options = ("elu", True, False, 1.0, 1e-6)  # feature map, normalize, causal, scale, eps
CAUSAL: Options = ("elu", True, True, 1.0, 1e-6)


def keep_most(g: torch.Generator, batch: int, tokens: int) -> torch.Tensor:
    """Three keys in four; never the first."""
    mask = torch.rand(batch, tokens, generator=g) < 0.75
    mask[:, :1] = False
    return mask


def drawn(
    dtype: torch.dtype, g: torch.Generator, sizes: tuple[int, ...], options: Options = NORMAL, *, masked: bool = False,
    make: Callable[..., torch.Tensor] = normal, **of_make: Any,
) -> tuple:  # fmt: skip
    """Arguments for sizes (B, H, N, M, D, E)."""
    batch, heads, queries, keys, width, values = sizes
    q = make(g, dtype, batch, heads, queries, width, **of_make)
    k = make(g, dtype, batch, heads, keys, width, **of_make)
    v = make(g, dtype, batch, heads, keys, values, **of_make)
    mask = keep_most(g, batch, keys) if masked else torch.empty(0, dtype=torch.bool)
    return q, k, v, mask, *options


def _token_major(dtype: torch.dtype, g: torch.Generator) -> tuple:
    """Heads as a projection leaves them: views of one [B, N, 3, H, D]."""
    qkv = normal(g, dtype, 2, 53, 3, 2, 16)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v, keep_most(g, 2, 53), *NORMAL


def _strided(dtype: torch.dtype, g: torch.Generator) -> tuple:
    q, k, v, mask, *rest = drawn(dtype, g, (2, 3, 19, 19, 11, 9), CAUSAL, masked=True)
    return strided(q), strided(k), strided(v), mask.T.contiguous().T, *rest


def _nan_padding(causal: bool) -> Callable[..., tuple]:
    """NaN and infinity in padded keys and values: nothing of them is seen."""

    def make(dtype: torch.dtype, g: torch.Generator) -> tuple:
        q, k, v, mask, *rest = drawn(dtype, g, (2, 2, 60, 60, 9, 17), CAUSAL if causal else NORMAL, masked=True)
        k[~mask[:, None].expand(2, 2, 60)] = torch.nan
        v[~mask[:, None].expand(2, 2, 60)] = torch.inf
        return q, k, v, mask, *rest

    return make


def _nan(causal: bool) -> Callable[..., tuple]:
    def make(dtype: torch.dtype, g: torch.Generator) -> tuple:
        args = drawn(dtype, g, (3, 2, 53, 53, 9, 17), CAUSAL if causal else NORMAL)
        args[0][0, 0, 3, 2] = args[1][1, 1, 50, 0] = args[2][2, 0, 7, 16] = torch.nan
        return args

    return make


def _all_masked(dtype: torch.dtype, g: torch.Generator) -> tuple:
    q, k, v, mask, *rest = drawn(dtype, g, (3, 2, 6, 6, 8, 8), masked=True)
    mask[1] = False
    return q, k, v, mask, *rest


def _no_weights(dtype: torch.dtype, g: torch.Generator) -> tuple:
    q, k, v, *rest = drawn(dtype, g, (2, 2, 50, 50, 8, 8), ("relu", True, True, 1.0, 1e-6))
    k[0] = -k[0].abs()
    k[1, :, :20] = -k[1, :, :20].abs()
    return q, k, v, *rest


def cases() -> list[Case]:
    def case(id: str, *sizes: int, options: Options = NORMAL, dtypes: Any = None, gradient: bool = False,
             compiled: bool = False, **rest: Any) -> Case:  # fmt: skip
        def make(dtype: torch.dtype, g: torch.Generator) -> tuple:
            return drawn(dtype, g, sizes, options, **rest)

        kinds = {} if dtypes is None else {"dtypes": dtypes}
        return Case(id, make, gradient=gradient, compiled=compiled, **kinds)

    raw: Options = ("identity", False, False, 0.25, 1e-6)
    return [  # B, H, N, M, D, E
        case("small", 2, 2, 5, 5, 4, 4, masked=True, compiled=True, gradient=True, dtypes=FULL_RANGE),
        case("one", 1, 1, 1, 1, 1, 1),
        case("one_causal", 1, 1, 1, 1, 1, 1, options=CAUSAL),
        case("one_key", 2, 2, 33, 1, 8, 8),
        case("cross", 2, 3, 50, 97, 16, 24, masked=True, gradient=True),
        case("past_a_tile", 1, 2, 65, 65, 33, 17),
        case("past_a_tile_causal", 1, 2, 65, 65, 33, 17, options=CAUSAL, gradient=True),
        case("past_two_tiles", 2, 1, 97, 97, 64, 64),
        case("past_two_tiles_causal", 2, 1, 97, 97, 64, 64, options=CAUSAL, masked=True),
        case("wide", 1, 1, 70, 70, 130, 72),
        case("wide_causal", 1, 1, 70, 70, 130, 72, options=CAUSAL, dtypes=FLOAT32),
        case("split", 1, 1, 1030, 1030, 8, 8),
        case("split_causal", 1, 1, 1030, 1030, 8, 8, options=CAUSAL),
        case("relu", 2, 2, 40, 40, 16, 16, options=("relu", True, False, 1.0, 1e-6)),
        case("squared_relu", 2, 2, 40, 40, 16, 16, options=("squared_relu", True, True, 0.5, 1e-6), dtypes=FULL_RANGE),
        case("identity", 2, 2, 40, 40, 16, 16, options=raw, gradient=True),
        case("identity_causal", 2, 2, 60, 60, 16, 16, options=("identity", False, True, 0.25, 1e-6)),
        case("elu_unnormalized", 2, 2, 40, 40, 16, 16, options=("elu", False, False, 0.01, 1e-6)),
        case("huge", 2, 2, 40, 40, 16, 16, scale=1e8, dtypes=FULL_RANGE),
        case("tiny", 2, 2, 40, 40, 16, 16, scale=1e-8, dtypes=FULL_RANGE),
        case("far_below_zero", 2, 2, 40, 40, 16, 16, mean=-60.0, dtypes=FLOAT32),
        case("large_mean", 2, 2, 40, 40, 16, 16, mean=1000.0, dtypes=FULL_RANGE),
        case("ties", 2, 2, 40, 40, 16, 16, make=integers),
        case("no_batch", 0, 2, 5, 5, 4, 4),
        case("no_tokens", 2, 2, 0, 0, 4, 4, options=CAUSAL),
        case("no_keys", 2, 2, 5, 0, 4, 4),
        case("no_values", 2, 2, 5, 5, 4, 0),
        Case("token_major", _token_major),
        Case("strided", _strided),
        Case("nan_padding", _nan_padding(False), FLOAT32),
        Case("nan_padding_causal", _nan_padding(True), FLOAT32),
        Case("nan", _nan(False), FLOAT32),
        Case("nan_causal", _nan(True), FLOAT32),
        Case("all_masked", _all_masked, FLOAT32),
        Case("no_weights", _no_weights),
    ]
