"""Inputs of neighbor_rescoring that tests, benchmarks and plan checks share."""

import torch

from planmill.kernels.common.inputs import normal, unit
from planmill.kernels.common.spec import Case


def cases() -> list[Case]:
    return [
        Case("small", lambda t, g: (normal(g, t, 9), unit(g, t, 9, 16), "1,2,3"), gradient=True, compiled=True),
        Case("one", lambda t, g: (normal(g, t, 1), unit(g, t, 1, 4), "1,2,3")),
        Case("visa", lambda t, g: (normal(g, t, 40), unit(g, t, 40, 32), "1,8,9")),
        Case("equal_scores", lambda t, g: (torch.full((6,), 2.5, dtype=t), unit(g, t, 6, 8), "1,2")),
        Case("zero_descriptors", lambda t, g: (normal(g, t, 6), torch.zeros(6, 8, dtype=t), "1,2,9")),
    ]
