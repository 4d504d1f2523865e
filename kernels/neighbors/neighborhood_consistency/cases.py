"""Inputs of neighborhood_consistency that tests, benchmarks and plan checks share."""

import torch

from planmill.kernels.common.inputs import integers, normal, poison_row, strided
from planmill.kernels.common.spec import Case


def _labels(g: torch.Generator, count: int, classes: int) -> torch.Tensor:
    return torch.randint(classes, (count,), generator=g)


def _made(t: torch.dtype, g: torch.Generator, b: int, n: int, d: int, c: int, k: int, weight: float = 0.8) -> tuple:
    return normal(g, t, b, d), normal(g, t, b, n, d), normal(g, t, b, n, c), _labels(g, b, c), weight, k


def cases() -> list[Case]:
    return [
        Case("small", lambda t, g: _made(t, g, 3, 7, 5, 4, 3), gradient=True, compiled=True),
        Case("one", lambda t, g: _made(t, g, 1, 1, 1, 1, 1)),
        Case("published", lambda t, g: _made(t, g, 5, 50, 64, 10, 20)),
        Case("last", lambda t, g: _made(t, g, 4, 9, 3, 2, 9, 0.25)),
        Case("no_inputs", lambda t, g: _made(t, g, 0, 9, 3, 2, 9)),
        Case(
            "ties_and_zeros",
            lambda t, g: (
                integers(g, t, 6, 2), integers(g, t, 6, 9, 2), integers(g, t, 6, 9, 3), _labels(g, 6, 3), 0.5, 4,
            ),
        ),
        Case(
            "strided",
            lambda t, g: (
                strided(normal(g, t, 4, 6)), strided(normal(g, t, 4, 8, 6)), strided(normal(g, t, 4, 8, 5)),
                _labels(g, 4, 5), 0.8, 2,
            ),
        ),
        Case(
            "nan",  # one neighbour of the first input, all of the second
            lambda t, g: (
                normal(g, t, 2, 6), poison_row(poison_row(poison_row(normal(g, t, 2, 2, 6), 0), 2), 3),
                normal(g, t, 2, 2, 3), _labels(g, 2, 3), 0.8, 1,
            ),
        ),
    ]  # fmt: skip
