"""Inputs of head_covariance that tests, benchmarks and plan checks share."""

from typing import Any

import torch

from planmill.kernels.common.inputs import normal, poison_row, strided
from planmill.kernels.common.spec import Case

FLOAT32 = (torch.float32,)


def drawn(
    dtype: torch.dtype, g: torch.Generator, batch: int, tokens: int, heads: int, d: int, *, norm: bool = True,
    centering: str = "scalar", pairing: str = "adjacent", interleaved: bool = False, normalize: bool = True,
    mean: float = 0.0, scale: float = 1.0,
) -> tuple:  # fmt: skip
    """Arguments with a LayerNorm whose bias is not zero, so that centering does something."""
    x = normal(g, dtype, batch, tokens, heads * d, mean=mean, scale=scale)
    weight, bias = (torch.randn(2, d, generator=g) + 1).unbind() if norm else (torch.empty(0), torch.empty(0))
    return x, weight, bias, heads, 1e-5, centering, pairing, interleaved, normalize


def _changed(change: str, **options: Any) -> Any:
    def make(dtype: torch.dtype, g: torch.Generator) -> tuple:
        args = list(drawn(dtype, g, 2, 30, 3, 11, **options))
        if change == "nan":
            args[0] = poison_row(args[0], 41)
        elif change == "strided":
            args[0] = strided(args[0])
        elif change == "dead":  # a channel of weight zero is constant
            args[1][4] = 0.0
            args[2][4] = 0.7
        return tuple(args)

    return make


def cases() -> list[Case]:
    def case(
        id: str, *sizes: int, dtypes: Any = None, gradient: bool = False, compiled: bool = False, **options: Any
    ) -> Case:
        def make(dtype: torch.dtype, g: torch.Generator) -> tuple:
            batch, tokens, heads, d = sizes
            return drawn(dtype, g, batch, tokens, heads, d, **options)

        kinds = {} if dtypes is None else {"dtypes": dtypes}
        return Case(id, make, gradient=gradient, compiled=compiled, **kinds)

    bare = {"norm": False, "normalize": False}
    return [  # batch, tokens, heads, channels of a head
        case("small", 2, 7, 3, 4, compiled=True, gradient=True, dtypes=FLOAT32),
        case("interleaved", 2, 37, 4, 5, interleaved=True, gradient=True),
        case("channel", 2, 37, 3, 9, centering="channel", gradient=True),
        case("none", 2, 37, 3, 9, centering="none", dtypes=FLOAT32, gradient=True),
        case("bare", 2, 37, 3, 9, centering="none", **bare),
        case("bare_scalar", 2, 40, 3, 17, mean=100.0, **bare, dtypes=FLOAT32),
        case("bare_channel", 2, 40, 3, 17, mean=100.0, centering="channel", **bare, dtypes=FLOAT32),
        case("far", 1, 40, 2, 33, mean=1000.0, scale=10.0, dtypes=FLOAT32),
        case("one_token", 2, 1, 2, 8),
        case("one_channel", 2, 9, 3, 1, norm=False, dtypes=FLOAT32),
        case("one_head", 2, 9, 1, 4, dtypes=FLOAT32),
        case("first", 1, 30, 4, 7, pairing="first", dtypes=FLOAT32),
        case("halves", 1, 30, 5, 7, pairing="halves", dtypes=FLOAT32),
        case("all", 1, 30, 4, 7, pairing="all", normalize=False, dtypes=FLOAT32),
        case("past_a_tile", 1, 50, 2, 65),
        case("past_two_tiles", 1, 33, 2, 130, dtypes=FLOAT32),
        case("many_tokens", 1, 700, 2, 19, centering="channel", dtypes=FLOAT32),
        case("huge", 1, 30, 2, 20, norm=False, scale=1e15, dtypes=FLOAT32),
        case("tiny", 1, 30, 2, 20, norm=False, scale=1e-5, dtypes=FLOAT32),
        case("no_batch", 0, 5, 2, 4, dtypes=FLOAT32),
        case("no_tokens", 2, 0, 2, 4, dtypes=FLOAT32),
        Case("nan", _changed("nan"), FLOAT32),
        Case("nan_bare", _changed("nan", norm=False, normalize=False, centering="channel"), FLOAT32),
        Case("strided", _changed("strided")),
        Case("dead", _changed("dead", centering="channel", normalize=False), FLOAT32),
    ]
