"""The redundancy that Barlow Twins minimise, without the D x D matrix where there are fewer rows than channels."""

from typing import NamedTuple

import torch

from planmill.kernels.common.checks import check_float, check_rank


class Redundancy(NamedTuple):
    """Two sums over the cross-correlation C of the channels of two views.

    Attributes:
        invariance: [] float64, sum of (C_ii - 1)^2: 0 where each channel says the same of both views.
        redundancy: [] float64, sum of C_ij^2 over i != j: 0 where no channel says what another does.
    """

    invariance: torch.Tensor
    redundancy: torch.Tensor

    def loss(self, weight: float = 0.0051) -> torch.Tensor:
        """[] float64: invariance + weight redundancy; the published weight is 0.0051."""
        return self.invariance + weight * self.redundancy


def measure_redundancy(first: torch.Tensor, second: torch.Tensor, *, eps: float = 1e-5) -> Redundancy:
    """How far the channels of two views are from being alike one by one, and unlike each other.

    C = z1^T z2 / B, where z is the view with the mean of each channel taken off and divided by its deviation (of
    divisor B). The sum of all squares is tr(z1 z1^T z2 z2^T) / B^2: with fewer rows than channels that takes two B x B
    matrices, and C is never written.

    Args:
        first: [B, D], float32, bfloat16 or float16, any strides: a row for each sample.
        second: [B, D], the same samples seen otherwise.
        eps: added to each variance; a constant channel then counts as 0.

    Returns:
        A Redundancy, differentiable. Statistics are float64, products float32, sums of squares float64. It depends on
        all samples: that is its definition.

    Raises:
        ValueError: views of different shapes, fewer than two samples, eps not above 0.
        TypeError: another dtype.

    Source: Zbontar et al., "Barlow Twins: self-supervised learning via redundancy reduction" (ICML 2021), section 2.
    """
    op = "measure_redundancy"
    for name, view in (("first", first), ("second", second)):
        check_rank(op, name, view, 2, "[B, D]")
        check_float(op, name, view)
    if first.shape != second.shape or first.shape[0] < 2:
        raise ValueError(
            f"{op}: first and second must be of one shape [B, D] with B at least 2, got {list(first.shape)} and "
            f"{list(second.shape)}"
        )
    if eps <= 0:
        raise ValueError(f"{op}: eps must be above 0, got {eps}")
    (rows, channels), (z1, z2) = first.shape, (_standardize(view, eps) for view in (first, second))
    diagonal = (z1.double() * z2).sum(0) / rows
    if rows < channels:
        total = ((z1 @ z1.T).double() * (z2 @ z2.T)).sum() / rows**2
    else:
        total = (z1.T @ z2).double().square().sum() / rows**2
    redundancy = (total - diagonal.square().sum()).clamp_min(0)
    return Redundancy((diagonal - 1).square().sum(), redundancy)


def _standardize(view: torch.Tensor, eps: float) -> torch.Tensor:
    centred = view.double() - view.double().mean(0)
    return (centred * (centred.square().mean(0) + eps).rsqrt()).float()
