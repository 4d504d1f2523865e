"""Inputs of slot_weights that tests, benchmarks and plan checks share."""

from collections.abc import Callable
from typing import Any

import torch

from planmill.kernels.common.inputs import integers, normal, strided
from planmill.kernels.common.spec import Case

FLOAT32 = (torch.float32,)
FULL_RANGE = (torch.float32, torch.bfloat16)


def keep_most(g: torch.Generator, batch: int, tokens: int) -> torch.Tensor:
    """Three tokens in four; never the first."""
    mask = torch.rand(batch, tokens, generator=g) < 0.75
    mask[:, :1] = False
    return mask


def drawn(
    dtype: torch.dtype, g: torch.Generator, batch: int, tokens: int, slots: int, weighting: str = "softmax", *,
    scaled: bool = False, masked: bool = False, scale_dispatch: bool = False,
    make: Callable[..., torch.Tensor] = normal, **options: Any,
) -> tuple:  # fmt: skip
    """Arguments with logits made by `make`."""
    logits = make(g, dtype, batch, tokens, slots, **options)
    scale = torch.randn(batch, tokens, generator=g) if scaled else torch.empty(0)
    mask = keep_most(g, batch, tokens) if masked else torch.empty(0, dtype=torch.bool)
    return logits, scale, mask, weighting, scale_dispatch


def _changed(change: Callable[[torch.Tensor], object], weighting: str, masked: bool = False) -> Callable[..., tuple]:
    def make(dtype: torch.dtype, g: torch.Generator) -> tuple:
        args = drawn(dtype, g, 3, 17, 21, weighting, scaled=True, scale_dispatch=True, masked=masked)
        change(args[0])
        return args

    return make


def _nan_entry(x: torch.Tensor) -> None:
    x[0, 3, 5] = x[1, 0, 0] = torch.nan


def _nan_row(x: torch.Tensor) -> None:
    x[1, 4] = torch.nan


def _nan_column(x: torch.Tensor) -> None:
    x[0, :, 2] = x[2, :, 20] = torch.nan


def _nan_mostly(x: torch.Tensor) -> None:
    x[0, 3], x[0, :, 5], x[0, 3, 0] = torch.nan, torch.nan, -torch.inf
    x[0, 2, 5] = -torch.inf


def _infinite(x: torch.Tensor) -> None:
    x[0, 3, 5] = x[0, 3, 6] = x[1, 2, 5] = torch.inf
    x[1, 5], x[2, :, 7], x[2, 1, 1] = -torch.inf, -torch.inf, -torch.inf


def _strided(dtype: torch.dtype, g: torch.Generator) -> tuple:
    logits, scale, mask, *rest = drawn(dtype, g, 2, 19, 23, "linear", scaled=True, masked=True, scale_dispatch=True)
    return strided(logits), strided(scale), mask.T.contiguous().T, *rest


def _all_masked(dtype: torch.dtype, g: torch.Generator) -> tuple:
    logits, scale, mask, *rest = drawn(dtype, g, 3, 6, 5, masked=True)
    mask[1] = False
    logits[1, 2] = torch.nan
    return logits, scale, mask, *rest


def cases() -> list[Case]:
    def case(id: str, *sizes: int, dtypes: Any = None, gradient: bool = False, compiled: bool = False, **options: Any):
        def make(dtype: torch.dtype, g: torch.Generator) -> tuple:
            batch, tokens, slots = sizes
            return drawn(dtype, g, batch, tokens, slots, **options)

        kinds = {} if dtypes is None else {"dtypes": dtypes}
        return Case(id, make, gradient=gradient, compiled=compiled, **kinds)

    made = [  # batch, tokens, slots
        case("small", 2, 5, 6, scaled=True, compiled=True, gradient=True, dtypes=FULL_RANGE),
        case("one", 1, 1, 1),
        case("one_token", 3, 1, 9, weighting="linear"),
        case("one_slot", 2, 33, 1),
        case("one_slot_linear", 2, 33, 1, weighting="linear", scaled=True, gradient=True),
        case("past_a_tile", 2, 70, 133, scaled=True, scale_dispatch=True),
        case("past_a_tile_linear", 2, 70, 133, weighting="linear"),
        case("many_tokens", 1, 300, 17),
        case("masked", 3, 17, 21, masked=True, scaled=True, gradient=True),
        case("masked_linear", 3, 17, 21, masked=True, scaled=True, weighting="linear", gradient=True),
        case("odd", 3, 11, 9, scaled=True, scale_dispatch=True, masked=True, gradient=True),
        case("huge", 2, 40, 37, scale=300.0),
        case("huge_linear", 2, 40, 37, scale=300.0, weighting="linear"),
        case("largest", 2, 9, 17, scale=1e37, dtypes=FULL_RANGE),
        case("largest_linear", 2, 9, 17, scale=1e37, weighting="linear", dtypes=FULL_RANGE),
        case("tiny_linear", 2, 9, 17, scale=1e-6, weighting="linear", dtypes=FULL_RANGE),
        case("large_mean", 2, 40, 37, mean=1000.0),
        case("large_mean_linear", 2, 40, 37, mean=1000.0, weighting="linear"),
        case("ties", 2, 12, 16, make=integers),
        case("constant_linear", 2, 12, 16, make=integers, high=1, weighting="linear"),
        case("no_batch", 0, 5, 6),
        case("no_tokens", 2, 0, 6, weighting="linear"),
        case("no_slots", 2, 5, 0),
        Case("strided", _strided),
        Case("all_masked", _all_masked, FLOAT32),
    ]
    changes = (_nan_entry, _nan_row, _nan_column, _nan_mostly, _infinite)
    for change in changes:
        made += [
            Case(change.__name__[1:], _changed(change, "softmax"), FLOAT32),
            Case(f"{change.__name__[1:]}_linear", _changed(change, "linear", masked=True), FLOAT32),
        ]
    return made
