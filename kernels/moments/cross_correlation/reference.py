"""Barlow Twins: C = normalised z1^T z2 / B; sum (C_ii - 1)^2 and sum of the other C_ij^2; float64."""

import torch


def cross_correlation_reference(
    first: torch.Tensor, second: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """C [D, D], what its diagonal is off from 1, and what the rest is off from 0; float64."""
    z1, z2 = (
        (z.double() - z.double().mean(0)) / (z.double().var(0, correction=0) + eps).sqrt() for z in (first, second)
    )
    c = z1.T @ z2 / len(first)
    on = (c.diagonal() - 1).square().sum()
    return c, on, c.square().sum() - c.diagonal().square().sum()
