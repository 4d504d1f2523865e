"""Inputs of mahalanobis that tests, benchmarks and plan checks share."""

import torch

from planmill.kernels.common.inputs import normal, poison_row, strided
from planmill.kernels.common.spec import Case


def gaussians(
    dtype: torch.dtype, g: torch.Generator, batch: int, positions: int, d: int, *, mean: float = 0.0, half: bool = False
) -> tuple:
    """Features and one Gaussian a position; `half`: the factor in bfloat16."""
    factor = torch.randn(positions, d * (d + 1) // 2, generator=g) / max(d, 1) ** 0.5
    center = torch.randn(positions, d, generator=g) + mean
    return normal(g, dtype, batch, positions, d, mean=mean), center, factor.bfloat16() if half else factor


def _strided(dtype: torch.dtype, g: torch.Generator) -> tuple:
    x, mean, factor = gaussians(dtype, g, 3, 7, 12)
    return strided(x), strided(mean), strided(factor)


def _nan(dtype: torch.dtype, g: torch.Generator) -> tuple:
    x, mean, factor = gaussians(dtype, g, 3, 7, 12)
    return poison_row(x, 9), mean, factor


def cases() -> list[Case]:
    f32 = (torch.float32,)
    return [
        Case("small", lambda t, g: gaussians(t, g, 2, 5, 6), gradient=True, compiled=True),
        Case("one", lambda t, g: gaussians(t, g, 1, 1, 1)),
        Case("one_position", lambda t, g: gaussians(t, g, 37, 1, 19), gradient=True),
        Case("one_vector", lambda t, g: gaussians(t, g, 1, 50, 33)),
        Case("half_factor", lambda t, g: gaussians(t, g, 5, 9, 33, half=True)),
        Case("wide", lambda t, g: gaussians(t, g, 6, 3, 130)),
        Case("empty_batch", lambda t, g: gaussians(t, g, 0, 4, 5)),
        Case("no_positions", lambda t, g: gaussians(t, g, 2, 0, 5)),
        Case("strided", _strided),
        Case("far_from_origin", lambda t, g: gaussians(t, g, 3, 8, 20, mean=1000.0), dtypes=f32),
        Case("nan", _nan),
    ]
