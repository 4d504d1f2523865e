"""Inputs of neighborhood_pooling that tests, benchmarks and plan checks share."""

from functools import partial

import torch

from planmill.kernels.common.inputs import normal, poison_row, strided
from planmill.kernels.common.spec import Case


def _window_case(size: int, dtype: torch.dtype, g: torch.Generator) -> tuple:
    return normal(g, dtype, 2, 169, 130), 13, 13, size


def cases() -> list[Case]:
    made = [
        Case("small", lambda t, g: (normal(g, t, 2, 12, 8), 3, 4, 3), gradient=True, compiled=True),
        Case("one", lambda t, g: (normal(g, t, 1, 1, 3), 1, 1, 3)),
        Case("wider_than_grid", lambda t, g: (normal(g, t, 2, 6, 20), 2, 3, 7)),
        Case("strided", lambda t, g: (strided(normal(g, t, 2, 35, 17)), 5, 7, 3)),
        Case("large_mean", lambda t, g: (normal(g, t, 2, 35, 48, mean=200.0, scale=30.0), 5, 7, 3)),
        Case("constant_image", lambda t, g: (torch.full((2, 20, 16), 3.0, dtype=t), 4, 5, 3)),
        Case("no_images", lambda t, g: (normal(g, t, 0, 12, 8), 3, 4, 3)),
        Case("nan", lambda t, g: (poison_row(normal(g, t, 3, 35, 16), 40), 5, 7, 3)),
    ]
    for size in (1, 3, 5):
        made += [Case(f"window_{size}", partial(_window_case, size), gradient=size > 1)]
    return made
