"""Inputs of token_unmerging that tests, benchmarks and plan checks share."""

import torch

from planmill.kernels.common.inputs import normal, poison_row, strided
from planmill.kernels.common.spec import Case


def _make(
    t: torch.dtype, g: torch.Generator, batch: int, rows: int, tokens: int, width: int, *,
    residual: bool = True, scale: bool = True, mean: float = 0.0,
) -> tuple:  # fmt: skip
    return (
        normal(g, t, batch, rows, width, mean=mean),
        torch.randint(0, rows, (batch, tokens), generator=g).int(),
        normal(g, t, batch, tokens, width, mean=mean) if residual else torch.empty(0, dtype=t),
        torch.randn(width, generator=g) if scale else torch.empty(0),
    )


def _strided(t: torch.dtype, g: torch.Generator) -> tuple:
    y, row, residual, scale = _make(t, g, 2, 30, 70, 40)
    return strided(y), row, strided(residual), scale


def _poisoned(t: torch.dtype, g: torch.Generator) -> tuple:
    y, row, residual, scale = _make(t, g, 2, 9, 40, 20)
    return poison_row(y, 3), row, poison_row(residual, 7, torch.inf), scale


def cases() -> list[Case]:
    return [
        Case("small", lambda t, g: _make(t, g, 2, 4, 9, 8), gradient=True, compiled=True),
        Case("one", lambda t, g: _make(t, g, 1, 1, 1, 1)),
        Case("odd", lambda t, g: _make(t, g, 3, 30, 67, 33), gradient=True),
        Case("across_tiles", lambda t, g: _make(t, g, 2, 150, 300, 1100)),
        Case("copy", lambda t, g: _make(t, g, 2, 9, 20, 33, residual=False, scale=False)),
        Case("no_scale", lambda t, g: _make(t, g, 2, 9, 20, 33, scale=False)),
        Case("no_residual", lambda t, g: _make(t, g, 2, 9, 20, 33, residual=False)),
        Case("no_batch", lambda t, g: _make(t, g, 0, 4, 9, 8)),
        Case("no_tokens", lambda t, g: _make(t, g, 2, 4, 0, 8)),
        Case("strided", _strided),
        Case("large_mean", lambda t, g: _make(t, g, 2, 30, 70, 40, mean=300.0, scale=False)),
        Case("nan_and_infinity", _poisoned),
    ]
