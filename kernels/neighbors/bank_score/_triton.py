"""Scoring against a bank on the GPU: the search of mutual scoring, rows only. Centre and unit come from the bank."""

import torch

from planmill.kernels.common.triton_checks import StaticKernel
from planmill.kernels.neighbors.mutual_score._triton import score


def launch(
    features: torch.Tensor, bank: torch.Tensor, low: float, high: float, radius: float, width: int, exact: bool
) -> torch.Tensor:
    """Scores [N, P] float32 of features [N, P, C] against bank [M, Q, C]; the contract of `score_against_bank`."""
    return score(features, bank, low, high, radius, width, exact, symmetric=False)


STATIC: list[StaticKernel] = []  # the kernels stand in kernels/common/triton_search.py
