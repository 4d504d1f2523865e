"""Gaussians of tail classes from those of head classes: representation calibration."""

from typing import NamedTuple

import torch

from planmill.kernels.common.checks import check_float, check_rank


class CalibratedMoments(NamedTuple):
    """What `calibrate_moments` gives.

    Attributes:
        means: [K, d] float32.
        covariances: [K, d, d] float32, symmetric.
    """

    means: torch.Tensor
    covariances: torch.Tensor


def calibrate_moments(
    means: torch.Tensor,
    covariances: torch.Tensor,
    head_means: torch.Tensor,
    head_covariances: torch.Tensor,
    head_counts: torch.Tensor,
    *,
    neighbors: int = 3,
    mixing: float = 0.5,
    spread: float = 0.0,
) -> CalibratedMoments:
    """Gaussians of classes with few rows, drawn towards the nearest classes with many.

    With the q head classes whose means are nearest (Euclidean) and w_i their shares of the rows of all q:

        mean' = (1 - mixing) mean + mixing sum_i w_i mean_i
        cov'  = (1 - mixing) cov + mixing sum_i w_i cov_i + spread I

    A class with fewer rows than channels has a singular covariance; with those of head classes, or spread, it has not.
    `class_moments` and `covariance_moments` give what goes in; labels of the rows should be cleaned before.

    Args:
        means: [K, d] of the tail classes, float32, bfloat16 or float16.
        covariances: [K, d, d] of the tail classes, any of these dtypes; zeros where a class has one row.
        head_means: [H, d] of the head classes.
        head_covariances: [H, d, d] of the head classes.
        head_counts: [H], rows of each head class, at least 1.
        neighbors: q, 1 to H.
        mixing: share of the head classes, 0 to 1.
        spread: added to the variances, in squared units of the features, at least 0.

    Returns:
        CalibratedMoments. Equal distances: the first head class. NaN stays in its class, but for one in a head mean,
        which is never the nearest unless all are.

    Raises:
        ValueError: wrong ranks or sizes, settings out of range, a head class without rows.
        TypeError: other dtypes.

    Source: Zhang et al., "When noisy labels meet long tail dilemmas: a representation calibration method" (ICCV 2023),
        distribution calibration, and Yang et al., "Free lunch for few-shot learning: distribution calibration" (ICLR
        2021). That the weights follow the numbers of rows alone was not verified for the first; the second has equal
        ones. Its contrastive training, removal of outliers and sampling are not built.
    """
    op = "calibrate_moments"
    for name, x, rank, layout in (
        ("means", means, 2, "[K, d]"),
        ("covariances", covariances, 3, "[K, d, d]"),
        ("head_means", head_means, 2, "[H, d]"),
        ("head_covariances", head_covariances, 3, "[H, d, d]"),
    ):
        check_rank(op, name, x, rank, layout)
        check_float(op, name, x)
    for name, x, count in (
        ("covariances", covariances, len(means)),
        ("head_covariances", head_covariances, len(head_means)),
    ):
        if x.shape != (count, means.shape[1], means.shape[1]):
            raise ValueError(f"{op}: {name} must be {[count, means.shape[1], means.shape[1]]}, got {list(x.shape)}")
    if head_means.shape[1] != means.shape[1]:
        raise ValueError(f"{op}: head_means must be [H, {means.shape[1]}] like means, got {list(head_means.shape)}")
    if head_counts.shape != head_means.shape[:1]:
        raise ValueError(f"{op}: head_counts must be [{len(head_means)}], got {list(head_counts.shape)}")
    if not 1 <= neighbors <= len(head_means):
        raise ValueError(f"{op}: neighbors must be from 1 to {len(head_means)}, got {neighbors}")
    if not 0 <= mixing <= 1 or not spread >= 0:
        raise ValueError(f"{op}: mixing must be from 0 to 1 and spread at least 0, got {mixing} and {spread}")
    if bool((head_counts < 1).any()):
        raise ValueError(f"{op}: head_counts must be at least 1, got {float(head_counts.min()):g}")
    distance = torch.cdist(means.double(), head_means.double(), compute_mode="donot_use_mm_for_euclid_dist")
    nearest = distance.nan_to_num(nan=torch.inf, posinf=torch.inf).argsort(dim=1, stable=True)[:, :neighbors]
    share = head_counts.double()[nearest]
    share = share / share.sum(1, keepdim=True)
    mean = torch.einsum("kq,kqd->kd", share, head_means.double()[nearest])
    identity = torch.eye(means.shape[1], dtype=torch.float64, device=means.device)
    covariance = (1 - mixing) * covariances.double() + spread * identity
    for rank in range(neighbors):  # no [K, q, d, d]
        covariance += mixing * share[:, rank, None, None] * head_covariances.double()[nearest[:, rank]]
    return CalibratedMoments(((1 - mixing) * means.double() + mixing * mean).float(), covariance.float())
